"""The recipe: what a run should do, read once from a TOML file and never changed.

Knows nothing about models, tensors or Ray; importing it takes a few hundredths of a second, so a
wrong recipe is refused before anything heavy is loaded. The text under a field is its
documentation, in `docs/recipe.md` and in `ray-abliterate init`.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe.direction import DirectionSettings
from ray_abliterate.recipe.parsing import apply_override, explain
from ray_abliterate.recipe.run import EvaluationSettings, RunSettings
from ray_abliterate.recipe.scorers import (
    KeywordRate,
    RefusalJudge,
    RefusalLogOdds,
    ScorerSettings,
)
from ray_abliterate.recipe.section import (
    PromptSource,
    Section,
    WriterRow,
)
from ray_abliterate.recipe.space import SpaceSettings
from ray_abliterate.recipe.suites import SuiteSettings

__all__ = [
    "Recipe",
]

Norm = Literal["none", "row", "column"]
Seeds = Literal["fisher", "auroc", "silhouette", "mutual-information", "log-odds", "none"]
Quantization = Literal["nf4", "int8", "torchao-int8", "torchao-int4"]
MEMORY = re.compile(r"^\d+(\.\d+)?([KMGT]i?B)$")


class ModelSettings(Section):
    """Which model, and how each replica holds it."""

    name: str = Field(min_length=1)
    """A Hub name, a local folder, `demo` (the embedded model) or `planted` (a tiny toy)."""
    revision: str | None = None
    """Commit, tag or branch of the Hub repository; pinned in `environment.json` either way."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is the checkpoint's own dtype."""
    quantization: Quantization | None = None
    """Quantize linear layers as they are loaded, to search in less memory: `nf4` (4 bits) and
    `int8` by bitsandbytes, `torchao-int8` and `torchao-int4` by torchao. Exports are in full
    precision."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models whose authors you trust."""
    attention: str | None = None
    """Attention implementation handed to transformers (`sdpa`, `eager`, …); its choice if unset."""
    chat_template: str | None = None
    """A file with a Jinja chat template, for models that have none; `plain` for no template."""
    enable_thinking: bool | None = None
    """Passed to the chat template where set (models that can think or not)."""
    gpus_per_replica: float | None = Field(None, ge=0)
    """GPUs of one replica: a fraction shares a card, 2 or more spreads the model. One if unset."""
    replicas: int | None = Field(None, ge=1)
    """Replicas of the model. If unset as many as the GPUs allow; without GPUs as many as cores (8
    for each) and memory allow."""
    threads_per_replica: int | None = Field(None, ge=1)
    """CPU threads of a replica. A node's cores divided by its replicas if unset."""
    max_memory: dict[str, str] | None = None
    """Memory that a replica's weights may use by device, as `{ 0 = "14GiB", cpu = "30GiB" }`. What
    does not fit on GPUs rests in CPU memory, and on disk after that: it works, slowly."""
    weight_cache: Literal["auto", "node", "device", "cpu"] = "auto"
    """Where pristine weights are kept: `node` in the node's object store, one copy for all replicas
    there; `device` beside each model; `cpu` in (pinned) CPU memory. `auto` is `node` without GPUs
    and `device` with."""
    writers: tuple[WriterRow, ...] = ()
    """Rows for a family that is not in the table; see `docs/architectures.md`."""

    def cache_location(self, on_gpu: bool) -> Literal["node", "device", "cpu"]:
        """Where pristine weights are kept in the end."""
        if self.weight_cache == "auto":
            return "device" if on_gpu else "node"
        return self.weight_cache

    @field_validator("gpus_per_replica")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"{value} must be a fraction below 1 or a whole number of GPUs")
        return value

    @field_validator("max_memory")
    @classmethod
    def _memory_is_readable(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for device, size in (value or {}).items():
            if not (device.isdigit() or device in ("cpu", "mps")):
                raise ValueError(f"{device!r} is not a device: the number of a GPU, or `cpu`")
            if not MEMORY.match(size):
                raise ValueError(f"{device} = {size!r} is not a size; write `14GiB` or `600MB`")
        return value

    @model_validator(mode="after")
    def _memory_has_its_gpus(self) -> "ModelSettings":
        cards = [device for device in self.max_memory or {} if device.isdigit()]
        if cards and self.gpus_per_replica == 0:
            raise ValueError(f"max_memory names GPU {cards[0]}, but gpus_per_replica = 0")
        return self


class PromptSettings(Section):
    """The two prompt sets that the direction is extracted from."""

    behaviour: PromptSource
    """Prompts that show the behaviour."""
    neutral: PromptSource
    """Prompts that don't."""
    filter_by_behaviour: bool = False
    """Have the base model answer both sets once, and leave out prompts whose answer contradicts
    their set: without the behaviour, or with it. The recipe's first `keyword-rate` or
    `refusal-judge` reads the answers; without one, `refusal-log-odds` tells."""
    least_prompts: int = Field(16, ge=1)
    """With `filter_by_behaviour`: a set that is left with fewer prompts ends the run."""


class EditSettings(Section):
    """What an edit keeps of each weight matrix."""

    norm: Norm = "row"
    """`row` keeps every output row's norm, `column` every input feature's, `none` neither."""


class SearchSettings(Section):
    """How many plans are tried, and how they are chosen."""

    trials: int = Field(200, ge=1)
    """Plans to try."""
    startup_trials: int | None = Field(None, ge=0)
    """Random plans before the sampler learns; min(60, 0.3 x trials) if unset."""
    ei_candidates: int = Field(128, ge=1)
    """Candidates that the sampler weighs per plan."""
    seed: int = Field(0, ge=0)
    """Seed of the sampler."""
    seeds: Seeds = "fisher"
    """Begin with two plans: the middle of the space, and one layer's direction taken out everywhere
    at full strength. That layer tells the prompt sets apart best by this measure, of prompts that
    its direction was not found from; or, with `log-odds`, refusals go furthest without its
    direction, on the prompts of the first `refusal-log-odds` and `kl-divergence`. `none`: no such
    plans."""
    concurrency: int | None = Field(None, ge=1)
    """Plans in evaluation at once; replicas times `trials_per_pass` if unset. One more waits."""
    batch_synchronous: bool = False
    """Choose and judge plans `concurrency` at a time: the same study for the same seed, whatever
    the timing. Replicas wait for the slowest of each batch, and a second or two between
    batches."""
    trials_per_pass: int | Literal["auto"] = "auto"
    """Plans that a replica evaluates in the same passes, by edits beside the weights. Pays on GPUs,
    where a step costs the same for more rows; the sampler knows less when it chooses. `auto` is 1
    on CPUs, and on GPUs the largest of 8, 4, 2 and 1 whose rows fit one batch, and of which all
    replicas together hold no more than a tenth of `trials`, nor more than `concurrency`."""
    trial_timeout_seconds: float | None = Field(None, gt=0)
    """A trial that takes longer fails, and its replica is started anew."""
    dominance_stop: bool = True
    """End a trial once a finished one is better whatever comes; its scores are then bounds."""
    space: SpaceSettings = Field(default_factory=SpaceSettings)
    """Where the plans come from."""

    @field_validator("trials_per_pass", mode="before")
    @classmethod
    def _one_trial_or_more(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (number and value >= 1):
            raise ValueError("give a whole number from 1, or `auto`")
        return value

    @model_validator(mode="after")
    def _batches_have_a_size(self) -> "SearchSettings":
        if self.batch_synchronous and self.concurrency is None:
            raise ValueError(
                "batch_synchronous needs concurrency, the plans of a batch: without it, that would "
                "be however many replicas there are at the time"
            )
        if self.batch_synchronous and self.trials_per_pass not in ("auto", 1):
            raise ValueError(
                "batch_synchronous needs trials_per_pass = 1: which plans share a pass is a "
                "matter of timing, and changes the last digits of their scores"
            )
        return self

    @property
    def startup(self) -> int:
        """Random plans before the sampler learns: min(60, 0.3 n) unless the recipe says."""
        if self.startup_trials is not None:
            return self.startup_trials
        return min(60, int(0.3 * self.trials))


class Recipe(Section):
    """Everything that describes a run."""

    model: ModelSettings
    prompts: PromptSettings
    direction: DirectionSettings = Field(default_factory=DirectionSettings)
    edit: EditSettings = Field(default_factory=EditSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    scorers: tuple[ScorerSettings, ...] = Field(min_length=1)
    suites: tuple[SuiteSettings, ...] = ()
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    run: RunSettings = Field(default_factory=RunSettings)

    @model_validator(mode="after")
    def _scorers_fit(self) -> "Recipe":
        names = [scorer.name for scorer in self.scorers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two scorers are named {repeated[0]!r}; give one another `name`")
        if all(scorer.goal == "report" for scorer in self.scorers):
            raise ValueError('every scorer has goal = "report"; the search needs one to optimise')
        names = [suite.name for suite in self.suites]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two suites are named {repeated[0]!r}; give one another `name`")
        if self.evaluation.replicas and not self.suites:
            raise ValueError(
                f"evaluation.replicas = {self.evaluation.replicas}, but there are no [[suites]] "
                "to measure"
            )
        return self

    @model_validator(mode="after")
    def _filter_has_a_test(self) -> "Recipe":
        if not self.prompts.filter_by_behaviour:
            return self
        if self.behaviour_test is None:
            raise ValueError(
                "prompts.filter_by_behaviour needs a scorer that can tell of one answer whether it "
                "shows the behaviour: a keyword-rate, refusal-judge or refusal-log-odds"
            )
        if self.direction.pairs_prompts:
            raise ValueError(
                "prompts.filter_by_behaviour leaves prompts out of either set, so that pairs no "
                "longer stand beside each other, as pca-paired needs them; choose one of the two"
            )
        return self

    @model_validator(mode="after")
    def _seeds_have_prompts(self) -> "Recipe":
        kinds = {scorer.kind for scorer in self.scorers}
        missing = [k for k in ("refusal-log-odds", "kl-divergence") if k not in kinds]
        if self.search.seeds == "log-odds" and missing:
            raise ValueError(
                f'search.seeds = "log-odds" tries layers on the prompts of a {missing[0]} scorer, '
                f'and there is none; add one (goal = "report" will do), or choose another measure'
            )
        return self

    @property
    def behaviour_test(self) -> "KeywordRate | RefusalJudge | RefusalLogOdds | None":
        """The scorer that says of one answer whether it shows the behaviour: the first that reads
        answers, or else the first that looks at how they begin."""
        kinds = ((KeywordRate, RefusalJudge), (RefusalLogOdds,))
        return next((s for kind in kinds for s in self.scorers if isinstance(s, kind)), None)

    @property
    def evaluators(self) -> ModelSettings:
        """The model as the evaluation's own replicas hold it."""
        own = self.evaluation
        changed: dict[str, Any] = {"replicas": own.replicas or None}
        if own.gpus_per_replica is not None:
            changed["gpus_per_replica"] = own.gpus_per_replica
        changed["threads_per_replica"] = own.threads_per_replica
        return self.model.model_copy(update=changed)

    @classmethod
    def load(cls, path: Path, overrides: tuple[str, ...] = ()) -> "Recipe":
        """Read a recipe, apply `key=value` overrides, and check everything that needs no model.

        Raises:
            RecipeError: the file is missing or not TOML, or a value is wrong; the message has one
                line per problem, each with the setting's full name.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"{path} cannot be read ({error.strerror or error}).\n"
                f"  Write one with:  ray-abliterate init {path}"
            ) from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not UTF-8 text; a recipe is a TOML file.") from None
        return cls.parse(text, source=path.name, overrides=overrides)

    @classmethod
    def parse(cls, text: str, source: str, overrides: tuple[str, ...] = ()) -> "Recipe":
        """The recipe in `text`; `source` names it in errors."""
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{source} is not TOML: {error}") from None
        for override in overrides:
            apply_override(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError("\n".join(explain(source, error, cls))) from None

    def to_json(self) -> str:
        """The whole recipe, defaults included, as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The inverse of `to_json`."""
        return cls.model_validate_json(text)


class SuiteFile(Section):
    """A file with `[[suites]]` alone, for `ray-abliterate evaluate`."""

    suites: tuple[SuiteSettings, ...] = ()

    @classmethod
    def of(cls, values: Sequence[Any]) -> tuple[SuiteSettings, ...]:
        """Suites as they were noted in a run's `environment.json`."""
        return cls.model_validate({"suites": values}).suites

    @classmethod
    def load(cls, path: Path) -> tuple[SuiteSettings, ...]:
        """The suites of a file; a whole recipe will do, too.

        Raises:
            RecipeError: the file is missing or not TOML, or a value is wrong.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path} can't be read: {error}") from None
        try:
            return cls.model_validate({"suites": values.get("suites", ())}).suites
        except ValidationError as error:
            raise RecipeError("\n".join(explain(path.name, error, cls))) from None
