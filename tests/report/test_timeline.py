"""A search over time: the study's times, the events, and their figure."""

from datetime import datetime
from pathlib import Path

import pytest

from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.report.timeline import Timeline
from ray_abliterate.search.frontier import Trial
from tests.support.report_runs import BASE, TWO, event, journal, make, page, plans, stopped

EVIL = "node <script>alert(1)</script>"


@pytest.fixture
def eventful(tmp_path: Path) -> RunDirectory:
    """Two plans out at once, then one that was cut off, one stopped early, one still out."""
    directory = make(tmp_path, [*TWO[:2], "broken", stopped(41, 0.3)], BASE)
    directory.record_facts(started="2026-01-31T11:00:00-0100")
    journal(directory, [(0, 10), (1, 12), (10, 20), (12, 14), (14, 15), (20, None)])
    event(directory, 3, "replica-lost", replica=EVIL, reason="out of memory; twice")
    event(directory, 4, "call-moved", method="evaluate", dead=EVIL)
    event(directory, 8, "replica-back", replica=EVIL, seconds=5.0)
    event(directory, 9, "node-lost", node="n2", replicas=1)
    event(directory, 11, "disk-refuses", reason="No space left", waiting=3)
    event(directory, 13, "disk-back")
    event(directory, 16, "from-the-future", what=1)
    event(directory, 17, "waiting-for-nodes")
    directory.append_event({"no": "time"})
    return directory


def test_plans_are_drawn_from_asking_to_telling_in_the_zone_of_the_run(
    eventful: RunDirectory,
) -> None:
    spans = {span.number: span for span in Timeline.read(eventful).spans}
    assert {n: s.outcome for n, s in spans.items()} == {
        0: "finished",
        1: "finished",
        2: "failed",
        3: "stopped early",
        4: "interrupted",
    }
    assert spans[0].start == datetime(2026, 1, 31, 11, 0, 0)
    assert spans[1].end == datetime(2026, 1, 31, 11, 0, 12)
    assert [spans[n].lane for n in range(5)] == [0, 1, 0, 1, 1]
    assert (spans[1].seconds, spans[4].seconds) == (3.5, None)


def test_evaluations_lie_in_the_rows_of_their_replicas_with_what_happened_to_those(
    tmp_path: Path,
) -> None:
    directory, draw = make(tmp_path, [], BASE), plans()
    for number, replica in enumerate((10, 2, 2, 2)):
        trial = Trial(number, draw(), TWO[0], 4.0, replica=f"replica {replica} on n")
        directory.append_trial(trial)
    directory.append_trial(Trial(4, draw(), None, 0.0, "broken"))
    directory.record_facts(started="2026-01-31T11:00:00-0100")
    journal(directory, [(0, 10), (0, 10), (2, 12), (9, 16), (1, 3)])
    event(directory, 5, "replica-lost", replica="replica 10 on n", reason="out of memory")
    spans = {span.number: span for span in Timeline.read(directory).spans}
    assert [spans[n].lane for n in range(5)] == [2, 0, 1, 0, 3]
    assert [spans[n].start.second for n in range(5)] == [6, 6, 8, 12, 1]
    assert Timeline.read(directory).names == {"replica 2 on n": 0.5, "replica 10 on n": 2, "": 3}
    axis = page(directory).axis("timeline", "yaxis")
    assert axis["ticktext"] == ["replica 2 on n", "replica 10 on n", "in flight"]
    traces = page(directory).traces("timeline")
    assert traces["event"]["y"] == [2]
    assert any("replica 10 on n" in text for text in traces["finished"]["text"])


def test_outages_have_an_end_only_where_it_is_recorded(eventful: RunDirectory) -> None:
    found = {(one.who, one.time.second): one for one in Timeline.read(eventful).events}
    lost = found[EVIL, 3]
    assert lost.end is not None and lost.end.second == 8
    assert "out of memory; twice" in lost.text and "back after 5 s" in lost.text
    assert found[EVIL, 4].end is None and found["node n2", 9].end is None
    disk = found["disk", 11]
    assert disk.end is not None and disk.end.second == 13
    assert found["search", 16].text == "from-the-future"
    assert found["search", 17].text == "waiting-for-nodes"
    assert len(found) == 6


def test_the_timeline_shows_bars_outages_and_points(eventful: RunDirectory) -> None:
    parsed = page(eventful)
    traces = parsed.traces("timeline")
    assert traces["finished"]["base"] == ["2026-01-31T11:00:00.000", "2026-01-31T11:00:01.000"]
    assert traces["finished"]["x"] == [10_000, 11_000] and traces["finished"]["y"] == [0, 1]
    assert set(traces) == {
        *("finished", "failed", "stopped early", "interrupted"),
        *("outage", "event"),
    }
    assert len(traces["outage"]["x"]) == 2 * 3 and len(traces["event"]["x"]) == 4
    axis = parsed.axis("timeline", "yaxis")
    assert axis["ticktext"][0] == "in flight"
    assert axis["ticktext"][1:] == [
        "node &lt;script&gt;alert(1)&lt;/script&gt;",
        "node n2",
        "disk",
        "search",
    ]
    assert all("<script>" not in text for text in traces["event"]["text"])
    assert "5 plans from 2026-01-31 11:00:00" in parsed.figures["timeline"]["alt"]
    assert "Pauses" not in parsed.figures["timeline"]["note"]


def test_a_pause_is_cut_out_and_said(tmp_path: Path) -> None:
    directory = make(tmp_path, TWO[:2], BASE)
    journal(directory, [(0, 10), (40_000, 40_010)])
    parsed = page(directory)
    (gap,) = parsed.axis("timeline", "xaxis")["rangebreaks"]
    assert gap["bounds"] == ["2026-01-31T12:00:40.000", "2026-01-31T23:06:10.000"]
    assert "Pauses are cut out" in parsed.figures["timeline"]["note"]


def test_without_a_journal_there_is_no_timeline(two: RunDirectory) -> None:
    assert "timeline" not in page(two).figures
