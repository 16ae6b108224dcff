"""A whole study against one of the peer: its log, and settings as TOML."""

import tomllib

from benchmarks.versus_heretic import whole_study


def test_the_peers_log_gives_trials_and_their_frontier():
    lines = [
        (1.0, "  * Initial refusals: 60/64"),
        (2.0, "Running trial 1 of 3..."),
        *[
            (3.0, text)
            for kl, hits in ((0.2, 5), (0.1, 5), (0.05, 9))
            for text in (f"  * KL divergence: {kl:.4f}", f"  * Refusals: {hits}/64")
        ],
    ]
    assert whole_study.seconds_of(lines, whole_study.FIRST_TRIAL) == 2.0
    assert whole_study.peer_scores(lines) == [(5, 0.2), (5, 0.1), (9, 0.05)]
    assert whole_study.frontier_pairs(whole_study.peer_scores(lines)) == [(5, 0.1), (9, 0.05)]


def test_settings_survive_the_way_through_toml():
    values = {"n": 2, "text": 'a "b" \\ é', "on": True, "set": {"file": "x.txt", "of": [{"k": 1}]}}
    assert tomllib.loads(whole_study.to_toml(values)) == values
