"""The recipe's `[direction]`: how the direction is computed; see `recipe/recipe.py`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_abliterate.recipe.parsing import suggestion
from ray_abliterate.recipe.section import PLUGIN, Section

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
    per_component: bool = False
    """Find directions for each component, too, in what it alone adds to the residual stream
    (attention, feed-forward, …), and edit each with its own. Reads as much again per component, at
    each of the `positions`."""
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

    @property
    def pairs_prompts(self) -> bool:
        """Whether prompt i of one set has to stand beside prompt i of the other."""
        return "pca-paired" in {self.method, *(member.method for member in self.ensemble)}
