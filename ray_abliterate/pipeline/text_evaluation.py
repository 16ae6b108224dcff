"""Reads one long text with models, chunk by chunk, over a pool of replicas.

How the text is read is chosen once and stored. Each chunk becomes a line in a file as soon as it is
read, so a text that was stopped in the middle goes on from there; pieces that don't depend on each
other are read by several replicas.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.errors import EvaluationChanged
from ray_abliterate.evaluation.streaming import ChunkResult, Totals
from ray_abliterate.evaluation.streaming.reader import ReadFiles, ReadPlan, TextRequest
from ray_abliterate.evaluation.suites.suite import PairedDifference
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.suite_runner import BASE_MODEL, MeasuredModel
from ray_abliterate.replica.messages import ReplicaApi
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import mean_interval

if TYPE_CHECKING:
    from ray_abliterate.cluster.object_store import Reference
    from ray_abliterate.cluster.pool import ReplicaPool
    from ray_abliterate.replica.messages import TrialSetup

ChunksRead = dict[int, ChunkResult]
"""Results by index of the chunk."""


@dataclass(frozen=True)
class TextResults:
    """What models make of one text.

    Attributes:
        totals: By model.
        chunks: By model, in order of the text.
    """

    totals: Mapping[str, Totals]
    chunks: Mapping[str, tuple[ChunkResult, ...]]

    def difference(self, base: str, other: str) -> PairedDifference | None:
        """Return how many more nats per token `other` needs than `base`, over the chunks of both.

        The interval is that of the mean over chunks, as if these did not depend on each other.
        None if no chunk has been read by both.
        """
        one, two = ({c.index: c for c in self.chunks[name]} for name in (base, other))
        both = sorted(set(one) & set(two))
        if not both:
            return None
        mean, low, high = mean_interval([two[i].loss - one[i].loss for i in both])
        before, after = (sum(side[i].loss for i in both) / len(both) for side in (one, two))
        return PairedDifference("nats per token", before, after, mean, low, high, len(both))


@dataclass(frozen=True)
class TextEvaluation:
    """Has replicas read texts, and stores what they find.

    Attributes:
        pool: Its replicas read.
        shared_setup: Reference to the run's setup; None for a model of no run.
        folder: Where results go.
        progress: Display of stages, steps and notes.
    """

    pool: "ReplicaPool"
    shared_setup: "Reference[TrialSetup] | None"
    folder: Path
    progress: Progress

    def read(
        self, request: TextRequest, models: Sequence[MeasuredModel], base: Mapping[str, str]
    ) -> TextResults:
        """Have every model read the text; chunks that are stored are not read again.

        Args:
            request: The text, and how it is to be read.
            models: The models, as plans of one base model.
            base: Name and weights' fingerprint of the base model.

        Raises:
            EvaluationChanged: the folder holds results of another request, text or base model.
            RayAbliterateError: the text can't be read; chunks that were read stay stored.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.progress.stage("text"):
            read_plan = self._read_plan(request, base)
        for note in read_plan.notes:
            self.progress.note(note)
        results = {model.name: _stored_chunks(self._file(model.name)) for model in models}
        with self.progress.stage("reading"), self._chunk_files(results) as append:
            self._read_chunks(read_plan, models, results, append)
        carry, notes = read_plan.reading.carry or "", read_plan.notes
        chunks = {name: tuple(own[i] for i in sorted(own)) for name, own in results.items()}
        totals = {name: Totals.of(own, carry, notes) for name, own in chunks.items()}
        values = {
            "model": base,
            "reading": read_plan.to_json(),
            "totals": {name: own.to_json() for name, own in totals.items()},
        }
        write_atomically(
            self.folder / "totals.json", (json.dumps(values, indent=2) + "\n").encode()
        )
        return TextResults(totals, chunks)

    def _read_chunks(
        self,
        read_plan: ReadPlan,
        models: Sequence[MeasuredModel],
        results: Mapping[str, ChunksRead],
        append: Callable[[str, ChunkResult], None],
    ) -> None:
        # Blocks before an edited model's first edit give the base model's hidden states, which the
        # base model therefore saves at these layers.
        first_edits: tuple[int, ...] = ()
        setup = self.shared_setup.argument if self.shared_setup is not None else None
        if setup is not None and read_plan.stretch is None and read_plan.reading.states:
            plans = [model.plan for model in models if model != BASE_MODEL and model.plan.profiles]
            first_edits = tuple(
                {self.pool.call(ReplicaApi.first_edited_block, plan, setup) for plan in plans}
            )
        pieces = [
            (model, first, count)
            for first, count in read_plan.pieces()
            for model in models
            if _first_missing(results[model.name], first, count, read_plan.chunks) is not None
        ]

        def arguments(
            number: int,
        ) -> tuple[ReadPlan, int, int | None, ReadFiles | None, Plan, "TrialSetup | None"]:
            model, first, count = pieces[number]
            start = _first_missing(results[model.name], first, count, read_plan.chunks)
            start = first if start is None else start
            layers = first_edits if model == BASE_MODEL else ()
            files = ReadFiles(self.folder.absolute(), model.name, layers) if count is None else None
            remaining = None if count is None else first + count - start
            return read_plan, start, remaining, files, model.plan, setup

        total = None if read_plan.chunks is None else read_plan.chunks * len(models)
        for number, result in self.pool.streams(ReplicaApi.read, len(pieces), arguments):
            name = pieces[number][0].name
            if result.index in results[name]:
                continue  # read once more after a replica died
            results[name][result.index] = result
            append(name, result)
            done = sum(len(own) for own in results.values())
            self.progress.step(done, total or done)

    def _read_plan(self, request: TextRequest, base: Mapping[str, str]) -> ReadPlan:
        """Return how the text is read: as it was begun, or as one replica chooses.

        The tokens of a text on the Hub are not counted, since that would be to read it twice.
        """
        count = not request.text.startswith("hub:")
        chosen = self.pool.call(ReplicaApi.plan_reading, request, count)
        asked = {"model": dict(base), "asked": asdict(request), "text": chosen.fingerprint}
        file = self.folder / "reading.json"
        if file.exists():
            stored = json.loads(file.read_text(encoding="utf-8"))
            changed = [name for name in asked if stored.get(name) != asked[name]]
            if changed:
                raise EvaluationChanged(
                    f"{self.folder} holds results of another text or model: "
                    f"{', '.join(changed)} changed.\n"
                    "  Choose another folder with --to, or remove this one."
                )
            return ReadPlan.from_json(stored["route"])
        values = {**asked, "route": chosen.to_json()}
        write_atomically(file, (json.dumps(values, indent=2) + "\n").encode())
        return chosen

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.chunks.jsonl"

    @contextmanager
    def _chunk_files(self, names: Iterable[str]) -> Iterator[Callable[[str, ChunkResult], None]]:
        """Open a file for each model, and yield a function that appends a chunk's line to it."""
        streams = {name: self._file(name).open("a", encoding="utf-8") for name in names}

        def append(name: str, result: ChunkResult) -> None:
            streams[name].write(json.dumps(result.to_json()) + "\n")
            streams[name].flush()

        try:
            yield append
        finally:
            for stream in streams.values():
                stream.close()


def _first_missing(
    results: ChunksRead, first: int, count: int | None, chunks: int | None
) -> int | None:
    """Return the first chunk of a piece that has not been read; None if all have.

    Args:
        results: The chunks that have been read.
        first: Index of the piece's first chunk.
        count: Chunks of the piece; None if it reaches to the text's end.
        chunks: Chunks of the whole text; None while they have not been counted.
    """
    if count is None and chunks is None:
        return next(i for i in range(len(results) + 1) if i not in results)
    stop = chunks if count is None else first + count
    return next((i for i in range(first, stop or 0) if i not in results), None)


def _stored_chunks(file: Path) -> ChunksRead:
    """Return the chunks in a file; a torn last line is cut off, so that lines can be appended."""
    if not file.exists():
        return {}
    whole, _, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        write_atomically(file, whole + b"\n" if whole else b"")
    results = map(ChunkResult.from_json, map(json.loads, whole.splitlines()))
    return {result.index: result for result in results}
