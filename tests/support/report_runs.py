"""Runs to report on, made of values, and pages read back as their elements."""

import json
import math
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.evaluation.suites.suite import SuiteChunk
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.recipe import Recipe, SuiteFile
from ray_abliterate.report.report import build_report
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.score import Score, Scorecard, wilson
from ray_abliterate.search.space import SearchSpace

LAYERS = 12
SHAPE = {"layers": LAYERS, "hidden": 32, "components": ["attn", "mlp"], "dtype": "bfloat16"}
PROMPTS = 96
VOID = {"meta", "link", "img", "br", "input", "base", "hr"}


def recipe(
    scores: Sequence[str] = ("keyword-rate", "kl-divergence"), model: str = "demo"
) -> Recipe:
    file = {"file": "prompts.txt"}
    kinds = {name: name for name in ("keyword-rate", "kl-divergence")}
    return Recipe.model_validate(
        {
            "model": {"name": model},
            "prompts": {
                "behaviour": {"builtin": "cooking-train", "split": "[:40]"},
                "neutral": file,
            },
            "search": {"trials": 60},
            "scorers": [
                {"kind": kinds.get(name, "plug:In"), "name": name, "prompts": file}
                for name in scores
            ],
        }
    )


def rate(hits: int) -> Score:
    low, high = wilson(hits, PROMPTS)
    detail = {"hits": hits, "total": PROMPTS}
    return Score("keyword-rate", hits / PROMPTS, low, high, detail=detail)


def divergence(value: float) -> Score:
    low, high = 0.8 * value, 1.3 * value
    return Score(
        "kl-divergence", value, low, high, unit="nats per token", detail={"worst": "SECRET"}
    )


def length(value: float) -> Score:
    return Score("length", value, value - 1, value + 1, goal="maximize", unit="tokens")


def card(*scores: Score) -> Scorecard:
    return Scorecard(scores)


def plans(layers: int = LAYERS, seed: int = 0) -> Callable[[], Plan]:
    """Draws random plans of the default search space."""
    shape = ModelShape(layers, 32, ("attn", "mlp"))
    space, dice = SearchSpace.of(shape, recipe().search.space, "row"), random.Random(seed)

    def draw() -> Plan:
        params = {
            name: dice.choice(d.options) if hasattr(d, "options") else dice.uniform(d.low, d.high)
            for name, d in space.parameters
        }
        return space.plan(params)

    return draw


def separation(layers: int = LAYERS) -> tuple[dict[str, float], ...]:
    return tuple(
        {
            "layer": layer,
            "auroc": 0.5 + 0.5 * math.exp(-(((layer / layers - 0.6) / 0.3) ** 2)),
            "fisher": 8 * math.exp(-(((layer / layers - 0.6) / 0.2) ** 2)),
            "silhouette": math.exp(-(((layer / layers - 0.6) / 0.3) ** 2)),
            "mutual_information": math.exp(-(((layer / layers - 0.6) / 0.3) ** 2)),
            "gap": 0.2 * 1.15**layer,
            "cosine": 0.99 - 0.4 * layer / layers,
            "behaviour_norm": 2.0 * 1.1**layer,
            "neutral_norm": 1.9 * 1.1**layer,
            "direction_norm": 0.3 * 1.15**layer,
        }
        for layer in range(layers)
    )


def make(
    path: Path,
    cards: Sequence[Scorecard | str],
    base: Scorecard | None = None,
    settings: Recipe | None = None,
    **environment: Any,
) -> RunDirectory:
    """A run directory; a trial is given as its scorecard, or as its error."""
    directory = RunDirectory.create(path / "run", settings or recipe(), "")
    directory.record_facts(model=SHAPE, started="2026-01-31T12:00:00+0000")
    directory.record_facts(versions={"torch": "2.13"}, **environment)
    if base is not None:
        directory.save_baseline(Baseline(base, separation(), 7))
    draw = plans()
    for number, outcome in enumerate(cards):
        failed = isinstance(outcome, str)
        scorecard, error = (None, outcome) if failed else (outcome, None)
        directory.append_trial(Trial(number, draw(), scorecard, 2.5 + number, error))  # type: ignore[arg-type]
    return directory


BASE = card(rate(90), divergence(0.0))
TWO = [card(rate(h), divergence(k)) for h, k in ((80, 1e-4), (40, 0.01), (50, 0.5), (2, 1.5))]


class Page(HTMLParser):
    """A page as its elements: tag, attributes, text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.elements[-1][2])

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for texts in self._open:
            texts.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            " ".join("".join(texts).split())
            for name, attrs, texts in self.elements
            if name == tag and attributes.items() <= attrs.items()
        ]

    @property
    def headings(self) -> list[str]:
        return self.texts("h2")

    @property
    def visible(self) -> str:
        return self.texts("main")[0]

    @property
    def figures(self) -> dict[str, Any]:
        found = self.texts("script", id="figures")
        return json.loads(found[0], parse_constant=pytest.fail) if found else {}

    def traces(self, figure: str, view: int = 0) -> dict[str, Any]:
        return {trace["name"]: trace for trace in self.figures[figure]["views"][view]["data"]}

    def axis(self, figure: str, axis: str, view: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.figures[figure]["views"][view]["layout"][axis]
        return found


def page(directory: RunDirectory) -> Page:
    return Page(build_report(directory))


def stopped(hits: int, kl: float) -> Scorecard:
    detail = {"hits": hits, "total": PROMPTS}
    value = hits / PROMPTS
    return card(Score("keyword-rate", value, value, 1.0, detail=detail, bound=True), divergence(kl))


BEGAN = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


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


SUITES = [
    {"kind": "multiple-choice", "name": "facts", "table": {"builtin": "general-knowledge"}},
    {"kind": "perplexity", "name": "loss", "table": {"builtin": "alice"}},
]


def measured(directory: RunDirectory, right: dict[str, int], chunks: int = 5) -> None:
    """Results of `facts`: so many of ten right in every chunk; of trial 1 only some chunks."""
    settings = SuiteFile.of(SUITES)
    directory.record_facts(suites=[setting.model_dump(mode="json") for setting in settings])
    kept = directory.suite_results(settings)
    for model, hits in right.items():
        own = chunks // 2 if model == "trial-1" else chunks
        for chunk in range(own):
            items = tuple(f"{chunk}-{item}" for item in range(10))
            right_ones = tuple(float(item < hits) for item in range(10))
            values = {"correct": right_ones, "letter-mass": (0.9,) * 10}
            kept.add(model, SuiteChunk("facts", str(chunk), f"f{chunk}", "", items, values))
        if own == chunks:
            kept.close(model, "facts", chunks)


def export(directory: RunDirectory, name: str, reloaded: float, within: bool, kind: str) -> None:
    folder = directory.path / "exports" / name
    folder.mkdir(parents=True)
    score = {"name": "keyword-rate", "trial": 0.5, "reloaded": reloaded, "within": within}
    values = {"reasons": ["<b>bfloat16</b>"], "scores": [score]}
    (folder / "verification.json").write_text(json.dumps(values), "utf-8")
    (folder / f"{kind}.json").write_text("{}", "utf-8")
