"""The comparison with the peer: mapping of parameters, arithmetic, the lines between processes.

Nothing here needs the peer, a model or torch.
"""

import json
import subprocess
import sys

import pytest

from benchmarks.harness import floor, tables
from benchmarks.harness import statistics as summary
from benchmarks.harness import worker_process as protocol
from benchmarks.versus_heretic import environment as peer_env
from benchmarks.versus_heretic import shared_plans as points
from benchmarks.versus_heretic import trial_speed as trial
from benchmarks.versus_heretic import whole_study as study
from ray_abliterate.search.plan import ModelShape, Plan, Profile

SHAPE = ModelShape(30, 576, ("attn", "mlp"))


def peer_strength(parameters: dict[str, float], layer: int) -> float:
    """The tent in the peer's own words: from max_weight at its position to min_weight at the
    distance, nothing beyond."""
    distance = abs(layer - parameters["max_weight_position"])
    if distance > parameters["min_weight_distance"]:
        return 0.0
    share = distance / parameters["min_weight_distance"]
    return (1 - share) * parameters["max_weight"] + share * parameters["min_weight"]


@pytest.mark.parametrize("plan", points.draw(SHAPE, "row", 20, seed=3))
def test_the_peers_parameters_give_every_layer_our_strength(plan):
    mapped = points.to_peer(plan)["parameters"]
    for component, name in points.COMPONENTS.items():
        theirs = [peer_strength(mapped[name], layer) for layer in range(SHAPE.layers)]
        assert theirs == pytest.approx(plan.strengths(component, SHAPE.layers))


def test_a_direction_index_is_given_for_a_global_direction_only():
    profiles = (("attn", Profile(1.0, 20.0, 0.5, 3.0)),)
    shared = points.to_peer(Plan("global", 12.5, "row", profiles))
    own = points.to_peer(Plan("per-layer", 12.5, "row", profiles))
    assert shared["direction_index"] == 12.5
    assert own["direction_index"] is None


def test_a_component_that_the_peer_lacks_is_refused():
    plan = Plan("global", 1.0, "row", (("mixer", Profile(1.0, 2.0, 0.5, 3.0)),))
    with pytest.raises(ValueError, match="mixer"):
        points.to_peer(plan)


def test_points_lie_in_the_peers_default_space_and_follow_the_seed_alone():
    plans = points.draw(SHAPE, "row", 200, seed=0)
    last = SHAPE.layers - 1
    for plan in plans:
        assert 0.4 * last <= plan.direction_layer <= 0.9 * last
        for _, profile in plan.profiles:
            assert 0.8 <= profile.peak <= 1.5
            assert 0.6 * last <= profile.peak_layer <= last
            assert 1.0 <= profile.reach <= 0.6 * last
    assert {plan.scope for plan in plans} == {"global", "per-layer"}
    assert points.draw(SHAPE, "row", 5, seed=0) == plans[:5]


def test_sides_that_differ_are_not_compared():
    ours = {"layers": 4, "hidden": 8, "components": ["attn", "mlp"], "dtype": "float32"}
    ours["threads"] = 2
    peer = ours | {"components": ["attn.o_proj", "mlp.down_proj"]}
    assert trial.shape_of(ours, peer) == ModelShape(4, 8, ("attn", "mlp"))
    with pytest.raises(ValueError, match="dtype"):
        trial.shape_of(ours, peer | {"dtype": "bfloat16"})


def test_a_pass_of_several_trials_is_compared_by_the_trial():
    found = summary.compare([2.0, 4.0], [3.0, 5.0, 6.0, 10.0], trials_per_pass=2)
    assert found["ours_seconds"] == {"min": 1.0, "median": 1.5, "max": 2.0}
    assert found["ratio"] == pytest.approx(5.5 / 1.5, abs=0.01)
    assert found["paired"] == {"min": 4.0, "median": 4.0, "max": 4.0}
    with pytest.raises(ValueError, match="passes"):
        summary.compare([2.0], [3.0], trials_per_pass=2)


def test_equal_verdicts_are_counted_over_trials_and_prompts():
    assert summary.agreement(["0110", "1111"], ["0111", "1111"]) == {"equal": 7, "verdicts": 8}


@pytest.mark.parametrize(
    ("ours", "peer", "same"), [(0.1605, 0.16050005, True), (0.16, 0.1605, False), (0, 1e-5, True)]
)
def test_kl_divergences_are_the_same_to_three_digits(ours, peer, same):
    assert summary.same_kl(ours, peer) is same


def test_the_last_lines_have_the_best_ratio_and_the_smaller_model_for_float32():
    def found(model, dtype, *ratios):
        per_pass = {str(k): {"ratio": r} for k, r in enumerate(ratios)}
        return {"model": model, "dtype": dtype, "per_pass": per_pass}

    lines = summary.verdict_lines(
        [
            found("answers", "bfloat16", 4.2, 7.3),
            found("answers", "float32", 1.7, 2.9),
            found("declines", "float32", 2.5),
        ]
    )
    assert lines == [
        "ratio bf16 answers: 7.30",
        "ratio bf16 declines: not measured",
        "ratio fp32: 2.50",
    ]


class Clock:
    """Stands where a worker stands; takes a second, and two more without `packing`."""

    def call(self, command, plans, off):
        return {"seconds": 3.0 if "packing" in off else 1.0}


def test_a_technique_is_worth_what_a_pass_takes_longer_without_it(monkeypatch):
    monkeypatch.setattr(trial, "SETTLE_SECONDS", 0)
    without = {"packing": ["packing"], "reuse": ["reuse"], "all": ["packing", "reuse"]}
    found = trial.slowdowns(Clock(), ["plan"], without, rounds=2)
    assert {name: row["slowdown"] for name, row in found.items()} == {
        "packing": 3.0,
        "reuse": 1.0,
        "all": 3.0,
    }


WORK = floor.Work(
    prefill_tokens=100,
    prompts=4,
    decode_tokens=20,
    decode_steps=10,
    linear_parameters=1000,
    head_parameters=500,
    bytes_per_parameter=2,
)


def test_a_floor_counts_two_flop_per_weight_and_token():
    assert WORK.prefill_flop == 2 * (100 * 1000 + 4 * 500)
    assert WORK.decode_flop == 2 * 20 * 1500
    assert WORK.bytes == 11 * 3000


def test_a_floor_takes_arithmetic_or_reading_whichever_is_longer():
    computing = floor.seconds(WORK, prefill_rate=1e3, decode_rate=1e3, bandwidth=1e12)
    reading = floor.seconds(WORK, prefill_rate=1e12, decode_rate=1e12, bandwidth=1e3)
    assert computing == pytest.approx((204_000 + 60_000) / 1e3)
    assert reading == pytest.approx(33_000 / 1e3)


def test_trials_of_one_pass_share_the_reading_of_weights():
    pair = floor.Work(**{**vars(WORK), "trials": 2})
    rates = {"prefill_rate": 1e12, "decode_rate": 1e12, "bandwidth": 1e3}
    assert floor.seconds(pair, **rates) == pytest.approx(0.5 * floor.seconds(WORK, **rates))
    assert pair.decode_rows == 2 * WORK.decode_rows


def test_a_floor_uses_the_rate_at_the_nearest_number_of_rows():
    assert floor.nearest({64: 1.0, 256: 2.0, 2048: 3.0}, 200) == 256


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
    assert study.when(lines, study.FIRST_TRIAL) == 2.0
    assert study.scores(lines) == [(5, 0.2), (5, 0.1), (9, 0.05)]
    assert study.frontier(study.scores(lines)) == [(5, 0.1), (9, 0.05)]


def test_settings_survive_the_way_through_toml():
    import tomllib

    values = {"n": 2, "text": 'a "b" \\ é', "on": True, "set": {"file": "x.txt", "of": [{"k": 1}]}}
    assert tomllib.loads(study.toml(values)) == values


def test_a_command_that_fails_answers_with_its_traceback():
    def fail(**_):
        raise ValueError("no such point")

    assert "no such point" in protocol.answer({"go": fail}, {"command": "go", "x": 1})["error"]
    assert protocol.answer({"add": lambda a: {"b": a + 1}}, {"command": "add", "a": 1}) == {"b": 2}


def test_what_a_worker_prints_stays_out_of_its_answers():
    program = (
        "from benchmarks.harness.worker_process import serve\n"
        "def go(n):\n    print('chatter')\n    return {'twice': 2 * n}\n"
        "serve({'go': go})"
    )
    order = json.dumps({"command": "go", "n": 4}) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=order,
        capture_output=True,
        text=True,
        check=True,
        cwd=protocol.ROOT,
        env=protocol.environment(1),
    )
    assert done.stdout == '{"twice": 8}\n'
    assert "chatter" in done.stderr


def test_the_peers_side_imports_nothing_of_ours():
    program = (
        "import sys; import benchmarks.versus_heretic.heretic_worker; "
        "print(any(name.split('.')[0] in ('ray_abliterate', 'torch') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=protocol.ROOT
    )
    assert done.stdout.strip() == "False", done.stderr


def test_the_peers_environment_names_every_package_once():
    names = [need.partition("~")[0] for need in peer_env.NEEDS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", tables.PAGES, ids=lambda file: file.name)
def test_the_committed_pages_have_the_tables_of_the_results(file):
    page = file.read_text(encoding="utf-8")
    assert page == tables.render(page), (
        f"docs/{file.name} is out of date; write it anew with\n"
        "  python -m benchmarks.harness.tables"
    )


def test_every_table_has_its_place_on_a_page():
    pages = [file.read_text(encoding="utf-8") for file in tables.PAGES]
    named = sorted(match["name"] for page in pages for match in tables.BLOCK.finditer(page))
    assert named == sorted(tables.TABLES)


def test_a_table_without_results_says_so(tmp_path):
    page = "a\n<!-- table: overview -->\nold\n<!-- end -->\nb\n"
    new = tables.render(page, tmp_path)
    assert new == "a\n<!-- table: overview -->\nNot measured yet.\n<!-- end -->\nb\n"
