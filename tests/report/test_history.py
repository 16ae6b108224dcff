"""What a run leaves besides its trials: the study's times, events, suites' results, exports."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.evaluation.suites.suite import SuiteChunk
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.report_exports import exports, note_export
from ray_abliterate.recipe import SuiteFile
from ray_abliterate.report.timeline import Timeline
from ray_abliterate.search.frontier import Trial
from tests.report.runs import BASE, TWO, make, page, plans
from tests.report.test_figures import stopped

BEGAN = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
EVIL = "node <script>alert(1)</script>"


def journal(directory: RunDirectory, spans: Sequence[tuple[float, float | None]]) -> None:
    """A study's journal, as Optuna writes it: seconds from asking to telling, if it was told."""
    from optuna.distributions import FloatDistribution
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import create_study
    from optuna.trial import TrialState, create_trial

    storage = JournalStorage(JournalFileBackend(str(directory.journal)))
    study = create_study(storage=storage, study_name="ours", directions=["minimize", "minimize"])
    for asked, told in spans:
        trial = create_trial(
            state=TrialState.COMPLETE,
            params={"x": 1.0},
            distributions={"x": FloatDistribution(0, 2)},
            values=[1.0, 1.0],
        )
        trial.datetime_start = BEGAN + timedelta(seconds=asked)
        trial.datetime_complete = BEGAN + timedelta(seconds=told or asked)
        if told is None:
            trial.state, trial.datetime_complete, trial.values = TrialState.RUNNING, None, None
        study._storage.create_new_trial(study._study_id, template_trial=trial)


def event(directory: RunDirectory, after: float, name: str, **details: Any) -> None:
    """Something that happened, on the clock of the driver: an hour before UTC."""
    local = (BEGAN + timedelta(seconds=after, hours=-1)).replace(tzinfo=None)
    time = local.isoformat(timespec="milliseconds")
    directory.append_event({"time": time, "event": name, **details})


@pytest.fixture
def eventful(tmp_path: Path) -> RunDirectory:
    """Two plans out at once, then one that was cut off, one stopped early, one still out."""
    directory = make(tmp_path, [*TWO[:2], "broken", stopped(41, 0.3)], BASE)
    directory.note(started="2026-01-31T11:00:00-0100")
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
        directory.append(trial)
    directory.append(Trial(4, draw(), None, 0.0, "broken"))
    directory.note(started="2026-01-31T11:00:00-0100")
    journal(directory, [(0, 10), (0, 10), (2, 12), (9, 16), (1, 3)])
    event(directory, 5, "replica-lost", replica="replica 10 on n", reason="out of memory")
    spans = {span.number: span for span in Timeline.read(directory).spans}
    assert [spans[n].lane for n in range(5)] == [2, 0, 1, 0, 3]
    assert [spans[n].start.second for n in range(5)] == [6, 6, 8, 12, 1]
    assert Timeline.read(directory).names == {"replica 2 on n": 0.5, "replica 10 on n": 2, "": 3}
    axis = page(directory).axis("timeline", "yaxis")
    assert axis["ticktext"] == ["replica 2 on n", "replica 10 on n", "plans out"]
    traces = page(directory).traces("timeline")
    assert traces["event"]["y"] == [2]
    assert any("replica 10 on n" in text for text in traces["finished"]["text"])


def test_outages_have_an_end_only_where_it_is_recorded(eventful: RunDirectory) -> None:
    found = {(one.who, one.time.second): one for one in Timeline.read(eventful).happenings}
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
    assert axis["ticktext"][0] == "plans out"
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


SUITES = [
    {"kind": "multiple-choice", "name": "facts", "table": {"builtin": "general-knowledge"}},
    {"kind": "perplexity", "name": "loss", "table": {"builtin": "alice"}},
]


def measured(directory: RunDirectory, right: dict[str, int], chunks: int = 5) -> None:
    """Results of `facts`: so many of ten right in every chunk; of trial 1 only some chunks."""
    settings = SuiteFile.of(SUITES)
    directory.note(suites=[setting.model_dump(mode="json") for setting in settings])
    kept = directory.measurements(settings)
    for model, hits in right.items():
        own = chunks // 2 if model == "trial-1" else chunks
        for chunk in range(own):
            items = tuple(f"{chunk}-{item}" for item in range(10))
            right_ones = tuple(float(item < hits) for item in range(10))
            values = {"correct": right_ones, "letter-mass": (0.9,) * 10}
            kept.add(model, SuiteChunk("facts", str(chunk), f"f{chunk}", "", items, values))
        if own == chunks:
            kept.close(model, "facts", chunks)


@pytest.fixture
def validated(tmp_path: Path) -> RunDirectory:
    directory = make(tmp_path, TWO, BASE)
    measured(directory, {"base": 8, "trial-1": 7, "trial-3": 5})
    return directory


def test_suites_are_in_the_table_the_hover_and_the_comparison(validated: RunDirectory) -> None:
    parsed = page(validated)
    assert "What else changed" in parsed.headings
    rows = [row for row in parsed.texts("tr") if re.match("(base model|trial .) 0", row)][1:]
    assert [row[:13] for row in rows] == ["base model 0.", "trial 3 0.5 [", "trial 1 0.7 ["]
    assert "-0.3 [" in rows[1] and ", p " in rows[1]
    text = parsed.traces("frontier")["frontier"]["text"][0]
    assert "<br>facts 0.5 [" in text and "from the base model" in text
    sheets = json.loads(parsed.texts("script", id="sheets")[0])
    place = [field["name"] for field in sheets["fields"]].index("facts")
    assert sheets["fields"][place]["goal"] == "maximize"
    found = {model["key"]: model["cells"][place] for model in sheets["models"]}
    assert found["3"][1] == 0.5 and found["0"] is None
    assert "not all chunks" in found["1"][0]


def test_scores_of_suites_lie_along_the_frontier_with_the_base_model_as_a_band(
    validated: RunDirectory,
) -> None:
    (view,) = page(validated).figures["validation"]["views"]
    (points,) = view["data"]
    assert points["customdata"] == ["1", "3"] and points["y"] == [0.7, 0.5]
    assert points["x"] == [0.01, 1.5]
    band = view["layout"]["shapes"][0]
    assert band["y0"] < 0.8 < band["y1"] and view["layout"]["shapes"][1]["y0"] == 0.8


def test_curves_go_to_the_last_chunk_over_powers_of_two(validated: RunDirectory) -> None:
    parsed = page(validated)
    curves = parsed.traces("curves")
    assert list(curves) == ["base model", "trial 1", "trial 3"]
    assert curves["trial 3"]["x"] == [10, 20, 40, 50] and set(curves["trial 3"]["y"]) == {0.5}
    assert curves["trial 1"]["x"] == [10, 20]


def test_suites_that_cannot_be_read_are_a_warning(validated: RunDirectory) -> None:
    (file,) = (validated.path / "evaluations" / "trial-3").iterdir()
    file.write_text("{broken\n" + file.read_text("utf-8"), "utf-8")
    parsed = page(validated)
    assert "What else changed" not in parsed.headings
    assert any("line 1 is damaged" in warning for warning in parsed.texts("li"))


def test_a_run_without_suites_or_exports_has_no_such_parts(two: RunDirectory) -> None:
    parsed = page(two)
    assert not {"What else changed", "What was exported"} & set(parsed.headings)
    assert not {"validation", "curves"} & set(parsed.figures)


def export(directory: RunDirectory, name: str, reloaded: float, within: bool, kind: str) -> None:
    folder = directory.path / "exports" / name
    folder.mkdir(parents=True)
    score = {"name": "keyword-rate", "trial": 0.5, "reloaded": reloaded, "within": within}
    values = {"reasons": ["<b>bfloat16</b>"], "scores": [score]}
    (folder / "verification.json").write_text(json.dumps(values), "utf-8")
    (folder / f"{kind}.json").write_text("{}", "utf-8")


def test_exports_elsewhere_are_listed_as_long_as_they_are_there(tmp_path: Path) -> None:
    directory = make(tmp_path, TWO, BASE)
    export(directory, "trial-3", 0.5, True, "config")
    own = directory.path / "exports" / "trial-3"
    away = own.rename(tmp_path / "away")
    export(directory, "trial-3", 0.5, True, "config")
    for folder in (own, away, away, tmp_path / "gone"):
        note_export(directory, folder)
    assert [one.name for one in exports(directory)] == ["trial-3", "away"]
    assert str(away) not in " ".join(page(directory).texts("td"))


def test_exports_in_the_run_are_listed_with_what_they_scored(tmp_path: Path) -> None:
    directory = make(tmp_path, TWO, BASE)
    export(directory, "trial-3", 0.5, True, "config")
    export(directory, "trial-1", 0.75, False, "adapter_config")
    export(directory, "torn", 0.5, True, "config")
    (directory.path / "exports" / "torn" / "verification.json").write_text('{"scores": [', "utf-8")
    parsed = page(directory)
    assert "What was exported" in parsed.headings
    rows = {row.split()[0]: row for row in parsed.texts("tr")}
    assert "merged model keyword-rate: 0.5, 0.5 the trial's scores" in rows["trial-3"]
    assert "adapter keyword-rate: 0.5, 0.75 (too far) not the trial's scores" in rows["trial-1"]
    assert "<b>bfloat16</b>" in rows["trial-1"]
    assert "can't be read" in rows["torn"]
