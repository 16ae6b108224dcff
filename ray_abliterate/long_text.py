"""One long text through a model, or through a trial of a run, chunk by chunk.

Each model reads the text on its own, with its state saved as it goes; what it found stands in a
JSON file, and a text that was stopped in the middle goes on from there.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_abliterate.errors import EvaluationError
from ray_abliterate.files import write_whole
from ray_abliterate.measurements import label
from ray_abliterate.model import LanguageModel
from ray_abliterate.plan import Plan
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.replica import Replica
from ray_abliterate.run import model_source
from ray_abliterate.rundir import RunDirectory
from ray_abliterate.streaming import StateFiles, StreamingEvaluator, Totals
from ray_abliterate.streaming.choosing import Settings, carry_of
from ray_abliterate.streaming.results import Progress

SAY_SECONDS = 5.0
"""How often progress is told."""


@dataclass(frozen=True)
class Reading:
    """How a text is read; fields are those of `StreamingEvaluator`.

    Attributes:
        states: GB of disk for the states in the middle of the base model that trials begin with.
    """

    text: str
    carry: str | None = None
    chunk_size: int | None = None
    overlap: int | None = None
    window: int | None = None
    max_tokens: int | None = None
    states: float = 1.0

    def __post_init__(self) -> None:
        """What can be known before a model is loaded.

        Raises:
            EvaluationError: a setting or the text can't be.
        """
        if self.states < 0:
            raise EvaluationError(f"states = {self.states} is negative.\n  Set it to 0 or more GB.")
        options = self.options()
        Settings(carry_of(options.pop("carry")), **options)
        if not self.text.startswith("hub:") and not Path(self.text).is_file():
            raise EvaluationError(
                f"--text {self.text!r} is not a file.\n"
                "  Give a file that exists, or hub:owner/name for a data set of the Hub."
            )

    def options(self) -> dict[str, Any]:
        """Arguments of the evaluator."""
        return {
            "carry": self.carry,
            "chunk_size": self.chunk_size,
            "overlap": self.overlap,
            "window": self.window,
            "max_tokens": self.max_tokens,
        }


def read_with_model(name: str, reading: Reading, to: Path, output: Console) -> dict[str, Totals]:
    """A model of the Hub or a folder.

    Raises:
        RayAbliterateError: the model or the text can't be read, or not in this way.
    """
    source = model_source(name, lambda text: output.print(text, markup=False))
    model = LanguageModel.load(source, ModelSettings(name=name))
    return _kept(to, name, {"model": _read(model, reading, to / "model", "model", output)})


def read_with_run(
    directory: RunDirectory, trial: int, reading: Reading, to: Path, output: Console
) -> dict[str, Totals]:
    """The base model of a run, and one of its trials.

    Raises:
        RayAbliterateError: the model or the text can't be read, or not in this way.
    """
    recipe, chosen = directory.recipe, directory.trial(trial)
    directions = directory.directions()
    assert directions is not None  # a trial has been scored
    source = model_source(recipe.model.name, lambda text: output.print(text, markup=False))
    replica = Replica(recipe, source, {})
    kept = StateFiles(to / "states", int(reading.states * 1e9)) if reading.states > 0 else None
    edited = (writer.layer for writer, _ in replica.cache.edits(chosen.plan, directions))
    at = (min(edited, default=0),)
    found = {}
    for number, plan in ((None, Plan.nothing()), (trial, chosen.plan)):
        name = label(number)
        with replica.cache.edited(plan, directions):
            found[name] = _read(replica.model, reading, to / name, name, output, kept, at)
    return _kept(to, recipe.model.name, found)


def _read(
    model: LanguageModel,
    reading: Reading,
    place: Path,
    name: str,
    output: Console,
    states: StateFiles | None = None,
    states_at: tuple[int, ...] = (),
) -> Totals:
    evaluator = StreamingEvaluator(model, states=states, states_at=states_at, **reading.options())
    state, chunks = place.with_suffix(".state"), place.with_suffix(".chunks.jsonl")
    place.parent.mkdir(parents=True, exist_ok=True)
    stream = evaluator.stream(
        reading.text,
        tokenizer=model.chat.tokenizer,
        state=state,
        on_progress=_Teller(name, output),
    )
    for note in stream.choice.notes:
        output.print(f"{name}: {note}", markup=False)
    with _lines(chunks, fresh=not stream.totals.chunks) as line:
        for result in stream:
            line(result.to_json())
    return stream.totals


@contextmanager
def _lines(file: Path, fresh: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    with file.open("w" if fresh else "a", encoding="utf-8") as stream:

        def line(values: dict[str, Any]) -> None:
            stream.write(json.dumps(values) + "\n")
            stream.flush()

        yield line


class _Teller:
    """Says how far it is, now and then."""

    def __init__(self, name: str, output: Console) -> None:
        self._name, self._output, self._said = name, output, time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._said < SAY_SECONDS:
            return
        self._said = time.monotonic()
        whole = f" of {progress.length:,}" if progress.length else ""
        left = (
            "" if progress.seconds_left is None else f", about {progress.seconds_left:.0f} s left"
        )
        totals = progress.totals
        self._output.print(
            f"{self._name}: {progress.position:,}{whole} tokens, perplexity "
            f"{totals.perplexity:.4g}, {totals.tokens_per_second:,.0f} tokens/s{left}",
            markup=False,
        )


def _kept(to: Path, model: str, found: dict[str, Totals]) -> dict[str, Totals]:
    values = {"model": model, "totals": {name: t.to_json() for name, t in found.items()}}
    write_whole(to / "totals.json", (json.dumps(values, indent=2) + "\n").encode())
    return found


def totals_table(found: dict[str, Totals]) -> Table:
    """A row per model."""
    table = Table(show_edge=False, pad_edge=False)
    for head in (
        "model",
        "perplexity",
        "nats per token",
        "by chunk",
        "tokens",
        "tokens/s",
        "carry",
    ):
        table.add_column(head)
    for name, totals in found.items():
        table.add_row(
            name,
            f"{totals.perplexity:.5g}",
            f"{totals.loss:.5f}",
            f"{totals.mean:.4f} ± {totals.deviation:.4f}",
            f"{totals.tokens:,}",
            f"{totals.tokens_per_second:,.0f}",
            totals.carry,
        )
    return table
