"""One long text through models, chunk by chunk, over a pool of replicas.

How it is read is chosen once and kept. Each chunk is a line in a file as soon as it is read, so a
text that was stopped in the middle goes on from there; pieces that don't depend on each other are
read by several replicas.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.data.atomic_files import write_whole
from ray_abliterate.errors import EvaluationChanged
from ray_abliterate.evaluation.streaming import ChunkResult, Totals
from ray_abliterate.evaluation.streaming.reader import ReadFiles, ReadPlan, TextRequest
from ray_abliterate.evaluation.suites.suite import PairedDifference
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.suite_runner import BASE_MODEL, Subject
from ray_abliterate.search.score import mean_interval

Found = dict[int, ChunkResult]
"""Chunks by number."""


@dataclass(frozen=True)
class Text:
    """What was found of one text.

    Attributes:
        totals: By model.
        chunks: By model, in order.
    """

    totals: Mapping[str, Totals]
    chunks: Mapping[str, tuple[ChunkResult, ...]]

    def difference(self, base: str, other: str) -> PairedDifference | None:
        """Nats per token that one model needs more than another, over the chunks of both.

        The interval is that of the mean over chunks, as if they did not depend on each other.
        """
        one, two = ({c.index: c for c in self.chunks[name]} for name in (base, other))
        both = sorted(set(one) & set(two))
        if not both:
            return None
        mean, low, high = mean_interval([two[i].loss - one[i].loss for i in both])
        before, after = (sum(side[i].loss for i in both) / len(both) for side in (one, two))
        return PairedDifference("nats per token", before, after, mean, low, high, len(both))


def read_text(
    pool: Any,
    reading: TextRequest,
    subjects: Sequence[Subject],
    shared: Any,
    model: Mapping[str, str],
    to: Path,
    progress: Progress,
) -> Text:
    """Every model reads the text; what was read before is not read again.

    Args:
        pool: Its replicas read.
        reading: What is asked for.
        subjects: The models, as plans of one base model.
        shared: Reference to the run's setup.
        model: Name and fingerprint of the base model.
        to: Folder for what is found.
        progress: Receives how far it is.

    Raises:
        EvaluationChanged: the folder holds another reading.
        RayAbliterateError: the text can't be read; what was read before is kept.
    """
    to.mkdir(parents=True, exist_ok=True)
    with progress.stage("text"):
        route = _route(pool, reading, model, to)
    for note in route.notes:
        progress.note(note)
    found = {subject.name: _known(_file(to, subject.name)) for subject in subjects}
    with progress.stage("reading"), _lines(to, found) as keep:
        _read(pool, route, subjects, shared, found, to, keep, progress)
    carry, notes = route.reading.carry or "", route.notes
    chunks = {name: tuple(own[i] for i in sorted(own)) for name, own in found.items()}
    text = Text({name: Totals.of(own, carry, notes) for name, own in chunks.items()}, chunks)
    totals = {name: own.to_json() for name, own in text.totals.items()}
    values = {"model": model, "reading": route.to_json(), "totals": totals}
    write_whole(to / "totals.json", (json.dumps(values, indent=2) + "\n").encode())
    return text


def _read(
    pool: Any,
    route: ReadPlan,
    subjects: Sequence[Subject],
    shared: Any,
    found: Mapping[str, Found],
    to: Path,
    keep: Callable[[str, ChunkResult], None],
    progress: Progress,
) -> None:
    begins: tuple[int, ...] = ()
    if route.stretch is None and route.reading.states:
        edited = [subject.plan for subject in subjects if subject != BASE_MODEL]
        begins = tuple({pool.call("begins", plan, shared) for plan in edited if plan.profiles})
    pieces = [
        (subject, first, count)
        for first, count in route.pieces()
        for subject in subjects
        if _missing(found[subject.name], first, count, route.chunks) is not None
    ]

    def arguments(number: int) -> tuple[Any, ...]:
        subject, first, count = pieces[number]
        start = _missing(found[subject.name], first, count, route.chunks)
        start = first if start is None else start
        later = begins if subject == BASE_MODEL else ()
        keeping = ReadFiles(to.absolute(), subject.name, later) if count is None else None
        left = None if count is None else first + count - start
        return route, start, left, keeping, subject.plan, shared

    wanted = None if route.chunks is None else route.chunks * len(subjects)
    for number, result in pool.streams("read", len(pieces), arguments):
        name = pieces[number][0].name
        if result.index in found[name]:
            continue
        found[name][result.index] = result
        keep(name, result)
        done = sum(len(own) for own in found.values())
        progress.step(done, wanted or done)


def _missing(found: Found, first: int, count: int | None, chunks: int | None) -> int | None:
    """The first chunk of a piece that is not known; None if all are."""
    if count is None and chunks is None:
        return next(i for i in range(len(found) + 1) if i not in found)
    stop = chunks if count is None else first + count
    return next((i for i in range(first, stop or 0) if i not in found), None)


def _route(pool: Any, reading: TextRequest, model: Mapping[str, str], to: Path) -> ReadPlan:
    """How the text is read: as it was begun, or as one replica chooses.

    A text of the Hub is not counted: that would be to read it twice.
    """
    found: ReadPlan = pool.call("route", reading, not reading.text.startswith("hub:"))
    asked = {"model": dict(model), "asked": asdict(reading), "text": found.fingerprint}
    file = to / "reading.json"
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in asked if known.get(name) != asked[name]]
        if changed:
            raise EvaluationChanged(
                f"{to} holds the reading of something else: {', '.join(changed)} changed.\n"
                "  Choose another folder with --to, or remove this one."
            )
        return ReadPlan.from_json(known["route"])
    values = {**asked, "route": found.to_json()}
    write_whole(file, (json.dumps(values, indent=2) + "\n").encode())
    return found


def _file(to: Path, name: str) -> Path:
    return to / f"{name}.chunks.jsonl"


def _known(file: Path) -> Found:
    """Chunks that were read before; a last line that was cut off is taken away."""
    if not file.exists():
        return {}
    whole, _, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        write_whole(file, whole + b"\n" if whole else b"")
    results = map(ChunkResult.from_json, map(json.loads, whole.splitlines()))
    return {result.index: result for result in results}


@contextmanager
def _lines(to: Path, names: Mapping[str, Any]) -> Iterator[Callable[[str, ChunkResult], None]]:
    streams = {name: _file(to, name).open("a", encoding="utf-8") for name in names}

    def line(name: str, result: ChunkResult) -> None:
        streams[name].write(json.dumps(result.to_json()) + "\n")
        streams[name].flush()

    try:
        yield line
    finally:
        for stream in streams.values():
            stream.close()




