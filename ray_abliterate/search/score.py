"""Scores: finite values with an interval, a goal and a name; and what a scorer is.

Knows nothing about models beyond the few methods a scorer calls (`TextModel`).
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.recipe import Goal

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = object

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """One number about one model: `low <= value <= high`, a 95 % interval.

    `detail` holds counts and parts that explain the value; numbers and short texts only. With
    `bound`, the value is only the best that this score could still have been: the trial was
    stopped, and `low` to `high` is where the score lies for certain.

    Raises:
        ScoreError: a number is not finite, or the interval does not hold the value.
    """

    name: str
    value: float
    low: float
    high: float
    goal: Goal = "minimize"
    unit: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    bound: bool = False

    def __post_init__(self) -> None:
        for label in ("value", "low", "high"):
            if not math.isfinite(getattr(self, label)):
                raise ScoreError(f"{self.name}: {label} is {getattr(self, label)}, not a number")
        if not self.low <= self.value <= self.high:
            raise ScoreError(f"{self.name}: {self.value} is outside [{self.low}, {self.high}]")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "goal": self.goal,
            "unit": self.unit,
            "detail": dict(self.detail),
            "bound": self.bound,
        }

    @property
    def loss(self) -> float:
        """The value, turned so that smaller is better."""
        return -self.value if self.goal == "maximize" else self.value

    @property
    def relation(self) -> str:
        """What stands before the value where people read it: `≥ ` or `≤ ` if it is a bound."""
        return ("≤ " if self.goal == "maximize" else "≥ ") if self.bound else ""


@dataclass(frozen=True)
class Scorecard:
    """The scores of one trial, in the recipe's order: the one order for names and values."""

    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if not self.scores:
            raise ScoreError("a scorecard needs at least one score")

    def __getitem__(self, name: str) -> Score:
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(name)

    @property
    def objectives(self) -> tuple[Score, ...]:
        """The scores that are searched for."""
        return tuple(score for score in self.scores if score.goal != "report")

    @property
    def losses(self) -> tuple[float, ...]:
        """The objectives' values, turned so that smaller is better."""
        return tuple(score.loss for score in self.objectives)

    @property
    def bounded(self) -> bool:
        """Some score is only a bound."""
        return any(score.bound for score in self.scores)

    def metrics(self) -> dict[str, float]:
        """Flat values for Tune: `kl-divergence`, `kl-divergence/low`, `kl-divergence/high`."""
        flat: dict[str, float] = {}
        for score in self.scores:
            flat[score.name] = score.value
            flat[f"{score.name}/low"], flat[f"{score.name}/high"] = score.low, score.high
        return flat

    def to_list(self) -> list[dict[str, Any]]:
        """As plain JSON values."""
        return [score.to_dict() for score in self.scores]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> "Scorecard":
        """The inverse of `to_list`; lists of before there were bounds hold none."""
        return cls(tuple(Score(**value) for value in values))


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate (Wilson 1927); 0 of 20 gives 0 to 0.161.

    Raises:
        ValueError: `total` is 0, or `hits` is not between 0 and `total`.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"no rate of {hits} in {total}")
    rate, z2 = hits / total, Z_95**2
    centre = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total**2))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by the percentile bootstrap (2,000 draws, fixed seed)."""
    import numpy

    array = numpy.asarray(values, dtype=numpy.float64)
    mean = float(array.mean())
    draws = numpy.random.default_rng(0).integers(0, len(array), size=(2000, len(array)))
    low, high = numpy.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return mean, min(float(low), mean), max(float(high), mean)


@dataclass(frozen=True)
class Answer:
    """What a model wrote to one prompt: new text only, special tokens left out."""

    text: str
    tokens: int
    """New tokens that were generated, the end token included."""
    stopped: bool
    """Generation ended before the model did, because nothing could change the verdict."""


@runtime_checkable
class AnswerWatch(Protocol):
    """Follows answers while they are written, and ends those that are decided."""

    def begin(self, index: int) -> None:
        """The answer to prompt `index` begins: for the first time, or again, after memory ran out
        and what was read of it no longer holds."""

    def read(self, index: int, text: str) -> bool:
        """`text` was added to the answer to prompt `index`; True: its verdict can't change."""

    def enough(self) -> bool:
        """No answer needs to go on: what has been read decides. Asked between steps."""


@runtime_checkable
class AnswerListener(AnswerWatch, Protocol):
    """A watch that is also told what each answer begins with, and what it has become.

    Where a model can't tell (`opened` by transformers' own generation, say), it doesn't.
    """

    def opened(self, index: int, logits: "Tensor") -> None:
        """Raw logits that the first token of the answer to prompt `index` is chosen by, `"vocab"`;
        again, if the answer begins again."""

    def ended(self, index: int, answer: Answer) -> None:
        """The answer to prompt `index` has come to its end, and others may still be written. Not
        told of answers that were stopped."""


@runtime_checkable
class TextModel(Protocol):
    """What scorers ask of a model; `language_model.LanguageModel` is the one that ships."""

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text as an answer begins with it; no special tokens."""

    def next_token_logits(self, prompts: Sequence[Prompt]) -> "Tensor":
        """Logits after each prompt, float32, `"prompt vocab"`."""

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> "list[Tensor]":
        """For each prompt the logits that predict each continuation token, `"token vocab"`."""

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """Token ids of the greedy answers, up to and with the end token."""

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        watch: AnswerWatch | None = None,
    ) -> list[Answer]:
        """Greedy answers; `watch` follows them, and may end them early."""


@runtime_checkable
class Scorer(Protocol):
    """Turns a model into a score. Made once per replica, from the recipe.

    `prepare` is called once, on the untouched model; `score` once per trial, on the edited one.
    A scorer keeps no other state: the score of a plan does not depend on earlier trials.

    It may also have `best: float`, the best value that its score can possibly have, if there is
    one. Without, a trial is never stopped before this scorer has scored it.
    """

    name: str
    goal: Goal

    def prepare(self, model: TextModel) -> None:
        """Measure what is needed of the base model."""

    def score(self, model: TextModel) -> Score:
        """Score the model as it is now."""


@runtime_checkable
class BoundedScorer(Scorer, Protocol):
    """A scorer that can end in the midst of scoring, once its score can only be too bad.

    `best` is the best value that the score can possibly have.
    """

    best: float

    def score_until(self, model: TextModel, hopeless: Callable[[float], bool]) -> Score:
        """Score the model, or end with a bound (`Score.bound`).

        Args:
            model: As it is now.
            hopeless: Whether the trial is lost if this score ends no better than the given loss
                (the value, or its negative where the goal is to maximise). True stays true for
                every larger loss.
        """


@runtime_checkable
class Recorder(Protocol):
    """A scorer that can hand out the answers behind its last score."""

    def last_answers(self) -> Sequence[tuple[Prompt, Answer, bool]]:
        """Prompt, answer, and whether the answer shows the behaviour."""


@runtime_checkable
class BehaviourTest(Protocol):
    """A scorer that can tell of each answer by itself."""

    def shows(self, model: TextModel) -> list[bool | None]:
        """Whether the model shows the behaviour at each of the scorer's prompts; None where it
        can't be told, and where an answer is empty or degenerate: such say nothing."""


def resolve(spec: str) -> Any:
    """The object that `module:attribute` names.

    Raises:
        ScoreError: the module cannot be imported or has no such attribute; says which.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ScoreError(
            f"{spec}: module {module_name!r} cannot be imported ({error}).\n"
            "  Code beside the recipe is found when its folder is on PYTHONPATH."
        ) from None
    if not hasattr(module, attribute):
        raise ScoreError(f"{spec}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def checked_call(owner: str, make: Any, options: Mapping[str, Any]) -> Any:
    """Call a function or class with its options held against its annotations.

    Args:
        owner: Who gave the options, for errors.
        make: What is called.
        options: Its keyword arguments.

    Raises:
        RecipeError: an option is missing, unknown or of another type.
    """
    from pydantic import ValidationError, validate_call

    checked = validate_call(config={"arbitrary_types_allowed": True})
    try:
        if not inspect.isclass(make):
            return checked(make)(**options)
        own = [vars(kind).get("__init__") for kind in make.__mro__]
        initialise = next(found for found in own if found is not None)
        if not inspect.isfunction(initialise):  # nothing whose annotations could be read
            return make(**options)
        instance = object.__new__(make)
        checked(initialise)(instance, **options)
    except ValidationError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"{owner}: {problems}") from None
    return instance
