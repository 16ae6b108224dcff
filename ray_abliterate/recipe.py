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
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe_run import EvaluationSettings, RunSettings
from ray_abliterate.recipe_scorers import (
    KeywordRate,
    KlDivergence,
    PluginScorer,
    RefusalJudge,
    RefusalLogOdds,
    ScorerSettings,
)
from ray_abliterate.recipe_sections import PLUGIN, Goal, PromptSource, Section, TableSource
from ray_abliterate.recipe_suites import SuiteSettings
from ray_abliterate.recipe_text import apply_override, explain, suggestion

__all__ = [
    "EvaluationSettings",
    "Goal",
    "KeywordRate",
    "KlDivergence",
    "PluginScorer",
    "PromptSource",
    "Recipe",
    "RefusalJudge",
    "RefusalLogOdds",
    "RunSettings",
    "ScorerSettings",
    "Section",
    "SuiteSettings",
    "TableSource",
]

Norm = Literal["none", "row", "column"]
Quantization = Literal["nf4", "int8", "torchao-int8", "torchao-int4"]
Interval = tuple[float, float]
MEMORY = re.compile(r"^\d+(\.\d+)?([KMGT]i?B)$")


class WriterRow(Section):
    """Declares a parameter of an unknown family that writes to the residual stream."""

    pattern: str
    """Regular expression of the parameter's whole name inside its block."""
    component: Literal["attn", "mlp", "experts", "shared_experts", "mixer", "linear_attn"]
    """The component it belongs to."""
    hidden_axis: int = Field(0, ge=0, le=2)
    """The axis that has the width of the residual stream: 0 for `nn.Linear`."""
    post_norm: str | None = None
    """Name inside the block of a norm between the writer and the stream, if there is one."""
    outer_norm: str | None = None
    """Name of a second norm after that one."""
    bias: str | None = None
    """Name inside the block of the writer's bias, where it is not beside the weight."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        return value


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


METHOD_NAMES = (
    "mean-difference", "median-difference", "geometric-median", "median-of-means",
    "variance-scaled", "whitened", "pca-paired", "pca-centred", "contrastive-pca", "svd-subspace",
    "logistic-probe", "inlp", "leace",
)  # fmt: skip


def _known_method(value: str) -> str:
    if value in METHOD_NAMES or PLUGIN.match(value):
        return value
    near = suggestion(value, METHOD_NAMES)
    raise ValueError(
        f"{value!r} is not a method.{near} There are {', '.join(METHOD_NAMES)}, "
        "and your own as `module:function`"
    )


class EnsembleMember(Section):
    """One method of an ensemble: its unit vector counts with its weight."""

    method: str
    """Any method but `ensemble`; of several directions the first counts."""
    weight: float = Field(1.0, gt=0)
    """How much it counts, beside the others'."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the method."""

    _method = field_validator("method")(_known_method)


class DirectionSettings(Section):
    """How the direction is computed from the residuals."""

    method: str = "mean-difference"
    """`mean-difference`, another one of `docs/directions.md`, `ensemble`, or your own as
    `module:function`."""
    ensemble: tuple[EnsembleMember, ...] = ()
    """Methods whose directions are added up; for `method = "ensemble"`."""
    project_out_neutral: bool = True
    """Take the mean of the neutral prompts out of the direction, so that ablation spares it."""
    project_out_components: int = Field(0, ge=0)
    """Take so many leading principal components of the neutral prompts out of it, too."""
    biproject: bool = False
    """Where a direction is used at another layer than it was found at, take the mean of the neutral
    prompts at that layer out of it, too."""
    winsorize_quantile: float = Field(1.0, gt=0.5, le=1.0)
    """Clamp each residual at this quantile of its magnitudes, layer by layer; 1 is off."""
    positions: int = Field(1, ge=1, le=64)
    """Tokens, counted from the end, that residuals are read at, all of them of the chat template or
    the response prefix; of these the one whose directions tell the sets apart best is taken. Each
    costs another pass over the prompts."""
    residual_dtype: Literal["float32", "float16"] = "float32"
    """How residuals are kept; `float16` takes half the space. Sums are float64 either way."""
    skip_common_prefix: bool = True
    """Find what every answer starts with (a closed thinking block) and look behind it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the method."""

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, value: str) -> str:
        return value if value == "ensemble" else _known_method(value)

    @model_validator(mode="after")
    def _ensembles_have_members(self) -> "DirectionSettings":
        if self.method == "ensemble" and not self.ensemble:
            raise ValueError('method = "ensemble" needs [[direction.ensemble]], a method each')
        if self.method != "ensemble" and self.ensemble:
            raise ValueError(f'ensemble is for method = "ensemble", not {self.method!r}')
        if self.method == "ensemble" and self.options:
            raise ValueError("options of an ensemble belong to its members")
        return self


class EditSettings(Section):
    """What an edit keeps of each weight matrix."""

    norm: Norm = "row"
    """`row` keeps every output row's norm, `column` every input feature's, `none` neither."""


class ComponentSpace(Section):
    """Ranges for one component that differ from `search.space`."""

    peak: Interval | None = None
    peak_layer: Interval | None = None
    floor: Interval | None = None
    reach: Interval | None = None


class SpaceSettings(Section):
    """The search space. Layer ranges are fractions of the last layer's index."""

    scope: tuple[Literal["global", "per-layer"], ...] = ("global", "per-layer")
    """One direction for all layers, or each layer's own."""
    direction_layer: Interval = (0.4, 0.9)
    """Where the global direction is taken."""
    source_offset: Interval | None = None
    """With `per-layer`: how far above its own layer (below, if negative) each layer's direction is
    taken, as `[-0.1, 0.1]`; its own if unset."""
    peak: Interval = (0.8, 1.5)
    """Largest strength. Below 0 switches the component off."""
    peak_layer: Interval = (0.6, 1.0)
    """Where the largest strength lies."""
    floor: Interval = (0.0, 1.0)
    """Strength at the end of the reach, as a fraction of the peak."""
    reach: Interval = (0.0, 0.6)
    """Layers on each side of the peak that are edited; at least one."""
    components: dict[str, ComponentSpace] = Field(default_factory=dict, validate_default=True)
    """Ranges by component. Feed-forward ones have peak = [-0.25, 1.5] unless you say otherwise,
    so that they can be switched off."""

    @field_validator("components")
    @classmethod
    def _feed_forward_can_be_off(
        cls, given: dict[str, ComponentSpace]
    ) -> dict[str, ComponentSpace]:
        off = ComponentSpace(peak=(-0.25, 1.5))
        own = {name: _set(given[name]) if name in given else {} for name in FEED_FORWARD}
        return {**given, **{name: off.model_copy(update=own[name]) for name in FEED_FORWARD}}

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "SpaceSettings":
        ranges = {n: getattr(self, n) for n in INTERVALS}
        for component, space in self.components.items():
            if component not in COMPONENT_NAMES:
                near = suggestion(component, COMPONENT_NAMES)
                raise ValueError(f"components.{component} is not a component.{near}")
            ranges |= {f"components.{component}.{n}": getattr(space, n) for n in INTERVALS[1:]}
        for name, bounds in ranges.items():
            if bounds is None:
                continue
            low, high = bounds
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}] must run from low to high")
            field = name.rsplit(".", 1)[-1]
            if field != "peak" and low < 0:
                raise ValueError(f"{name} = [{low}, {high}] must not be negative")
            if field in ("direction_layer", "peak_layer", "floor") and high > 1:
                raise ValueError(f"{name} = [{low}, {high}] is a fraction and ends at 1")
        if not self.scope:
            raise ValueError("scope must hold `global`, `per-layer` or both")
        return self

    @model_validator(mode="after")
    def _offset_has_a_use(self) -> "SpaceSettings":
        low, high = self.source_offset or (0.0, 0.0)
        if not -1 <= low <= high <= 1:
            raise ValueError(
                f"source_offset = [{low}, {high}] must run from low to high, inside [-1, 1]"
            )
        if self.source_offset is not None and "per-layer" not in self.scope:
            raise ValueError("source_offset is for `per-layer`, which scope leaves out")
        return self


def _set(space: "ComponentSpace") -> dict[str, Any]:
    return {name: getattr(space, name) for name in space.model_fields_set}


FEED_FORWARD = ("mlp", "experts", "shared_experts")
INTERVALS = ("direction_layer", "peak", "peak_layer", "floor", "reach")
COMPONENT_NAMES = get_args(WriterRow.model_fields["component"].annotation)


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
    seed_points: bool = True
    """Begin with two plans known to be sensible: full strength everywhere, and the middle."""
    concurrency: int | None = Field(None, ge=1)
    """Plans in evaluation at once; replicas times `trials_per_pass` if unset. One more waits."""
    batch_synchronous: bool = False
    """Choose and judge plans `concurrency` at a time: the same study for the same seed, whatever
    the timing. Replicas wait for the slowest of each batch, and a second or two between
    batches."""
    trials_per_pass: int = Field(1, ge=1)
    """Plans that a replica evaluates in the same passes, by edits beside the weights. Pays on GPUs,
    where a step costs the same for more rows; the sampler knows less when it chooses."""
    trial_timeout_seconds: float | None = Field(None, gt=0)
    """A trial that takes longer fails, and its replica is started anew."""
    dominance_stop: bool = True
    """End a trial once a finished one is better whatever comes; its scores are then bounds."""
    space: SpaceSettings = Field(default_factory=SpaceSettings)
    """Where the plans come from."""

    @model_validator(mode="after")
    def _batches_have_a_size(self) -> "SearchSettings":
        if self.batch_synchronous and self.concurrency is None:
            raise ValueError(
                "batch_synchronous needs concurrency, the plans of a batch: without it, that would "
                "be however many replicas there are at the time"
            )
        if self.batch_synchronous and self.trials_per_pass > 1:
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
