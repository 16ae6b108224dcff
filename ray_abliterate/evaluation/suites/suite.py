"""What a suite is: a measurement of a model in fixed chunks of work. Values; knows no model.

A chunk holds its own items, so whoever runs it needs no file. Any process may run any chunk, and
run it again: the result is the same, and says which items it is of. So the results of any number of
actors are combined exactly, in whatever order they come.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.errors import ScoreError
from ray_abliterate.model.text_model import Answer, TextModel
from ray_abliterate.search.score import Score


@dataclass(frozen=True)
class Measure:
    """One quantity that is measured of every item.

    Attributes:
        name: Key in `SuiteChunk.values`; the first measure of a suite gives its main score.
        kind: `rate` if values are 0 or 1, `mean` if they are any numbers.
        better: Which way is better; `report` if neither.
        unit: Unit of the values.
    """

    name: str
    kind: Literal["rate", "mean"]
    better: Literal["minimize", "maximize", "report"] = "report"
    unit: str = ""


@dataclass(frozen=True)
class Chunk:
    """A unit of work.

    Attributes:
        suite: Name of the suite.
        id: Its name within the suite; the same whenever the suite is listed.
        group: What its items have in common, such as a category; `""` for nothing.
        items: What is asked: JSON values, each with an `id` that is unique in the suite.
    """

    suite: str
    id: str
    group: str
    items: tuple[Mapping[str, Any], ...]

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the items."""
        text = json.dumps(list(self.items), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def item_ids(self) -> tuple[str, ...]:
        """Return the items' ids, in order."""
        return tuple(str(item["id"]) for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Return the chunk as plain JSON values."""
        return {**asdict(self), "items": list(self.items)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Chunk":
        """Read back what `to_dict` gave."""
        return cls(**{**values, "items": tuple(values["items"])})


@dataclass(frozen=True)
class SuiteChunk:
    """The result of one chunk.

    Attributes:
        suite: Name of the suite.
        chunk: Id of the chunk.
        fingerprint: Fingerprint of the chunk's items.
        group: Group of the chunk.
        items: Ids of the items, in order.
        values: By measure, a number for each item; None where it is unknown, which leaves the item
            out of the denominator.
        counts: Whole numbers that are added up over chunks.
        sums: Numbers that are added up over chunks.
        rows: Texts for people to read, if they are stored.

    Raises:
        ScoreError: a value is not a finite number, or there is not one for every item.
    """

    suite: str
    chunk: str
    fingerprint: str
    group: str
    items: tuple[str, ...]
    values: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            if len(values) != len(self.items):
                raise ScoreError(
                    f"{self.suite}, chunk {self.chunk}: {len(values)} values of {name!r} for "
                    f"{len(self.items)} items; give one for each, None where it is unknown"
                )
        numbers = [v for values in self.values.values() for v in values if v is not None]
        for number in [*numbers, *self.sums.values()]:
            if not math.isfinite(number):
                raise ScoreError(
                    f"{self.suite}, chunk {self.chunk}: {number} is not a finite number"
                )

    @classmethod
    def of(
        cls,
        chunk: Chunk,
        values: Mapping[str, Sequence[float | None]] | None = None,
        counts: Mapping[str, int] | None = None,
        sums: Mapping[str, float] | None = None,
        rows: Iterable[Mapping[str, Any]] = (),
    ) -> "SuiteChunk":
        """Make the result of `chunk`, with its ids and fingerprint."""
        return cls(
            chunk.suite,
            chunk.id,
            chunk.fingerprint,
            chunk.group,
            chunk.item_ids,
            {name: tuple(numbers) for name, numbers in (values or {}).items()},
            dict(counts or {}),
            dict(sums or {}),
            tuple(rows),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return json.loads(json.dumps(asdict(self), ensure_ascii=False))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SuiteChunk":
        """Read back what `to_dict` gave."""
        numbers = {name: tuple(each) for name, each in values["values"].items()}
        items, rows = tuple(values["items"]), tuple(values["rows"])
        return cls(**{**values, "items": items, "values": numbers, "rows": rows})


@dataclass(frozen=True)
class PairedDifference:
    """How two models differ in one measure, on the items that are known of both.

    Attributes:
        name: The measure.
        base: Its value for the first model.
        other: Its value for the second model.
        difference: The second value minus the first.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of that interval.
        items: Number of items that are known of both.
        p: Probability of a difference this large if the models are equal, where it is exact.
        method: How interval and p were computed.
    """

    name: str
    base: float
    other: float
    difference: float
    low: float
    high: float
    items: int
    p: float | None = None
    method: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as plain JSON values."""
        return asdict(self)


@runtime_checkable
class SuiteModel(TextModel, Protocol):
    """What suites ask of a model; `LanguageModel` is the one that ships."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[Answer]:
        """Return sampled answers, which are the same for the same arguments."""

    def unedited(self) -> AbstractContextManager[None]:
        """Make the model the unedited one in a `with` block, and edit it again after it."""


@runtime_checkable
class Suite(Protocol):
    """Measures a model chunk by chunk. It is small and can be pickled: it travels to the models."""

    name: str
    measures: tuple[Measure, ...]

    def chunks(self) -> Iterator[Chunk]:
        """Yield all units of work, read as they are asked for; they are the same every time.

        Raises:
            RayAbliterateError: an item is not usable; the chunks before it have been yielded.
        """

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Measure the model as it is now on one chunk; running it again gives the same result."""

    def summary(self, chunks: Sequence[SuiteChunk]) -> tuple[Score, ...]:
        """Return scores with intervals, which do not depend on the order of the chunks."""

    def compare(
        self, base: Sequence[SuiteChunk], other: Sequence[SuiteChunk]
    ) -> tuple[PairedDifference, ...]:
        """Return how two models differ on the items that both were asked."""
