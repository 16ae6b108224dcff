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
        f"{value!r} is not a method.{near} Known: {', '.join(METHOD_NAMES)}; "
        "or your own as `module:function`"
    )


class EnsembleMember(Section):
    """One method of an ensemble, whose unit vector counts with its weight."""

    method: str
    """Any method but `ensemble`; of several directions only the first is used."""
    weight: float = Field(1.0, gt=0)
    """Its weight relative to the other members'."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the method."""

    _method = field_validator("method")(_known_method)


class DirectionSettings(Section):
    """How directions are computed from the residuals."""

    method: str = "mean-difference"
    """`mean-difference`, another method of `docs/directions.md`, `ensemble`, or your own as
    `module:function`."""
    ensemble: tuple[EnsembleMember, ...] = ()
    """Methods whose directions are summed; for `method = "ensemble"`."""
    project_out_neutral: bool = True
    """Make the direction orthogonal to the neutral prompts' mean, so that ablation spares the
    mean."""
    project_out_components: int = Field(0, ge=0)
    """Make it orthogonal to so many leading principal components of the neutral prompts, too."""
    biproject: bool = False
    """Where a direction is used at another layer than it was computed at, make it orthogonal to the
    neutral prompts' mean at that layer, too."""
    winsorize_quantile: float = Field(1.0, gt=0.5, le=1.0)
    """Clamp the values of each residual to this quantile of their magnitudes, layer by layer; 1
    switches it off."""
    positions: int = Field(1, ge=1, le=64)
    """Token positions, counted from the end, at which residuals are read; all must belong to the
    chat template or the response prefix. The position whose directions separate the sets best is
    used. Each costs another pass over the prompts."""
    per_component: bool = False
    """Also compute directions for each component, from what it alone adds to the residual stream
    (attention, feed-forward, …), and edit each component with its own. It reads as much again per
    component, at each of the `positions`."""
    residual_dtype: Literal["float32", "float16"] = "float32"
    """How residuals are stored; `float16` takes half the space. Sums are float64 either way."""
    skip_common_prefix: bool = True
    """Find what every answer starts with (such as a closed thinking block) and read residuals after
    it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the method."""

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, value: str) -> str:
        return value if value == "ensemble" else _known_method(value)

    @model_validator(mode="after")
    def _ensembles_have_members(self) -> "DirectionSettings":
        if self.method == "ensemble" and not self.ensemble:
            raise ValueError(
                'method = "ensemble" needs [[direction.ensemble]] sections, one per method'
            )
        if self.method != "ensemble" and self.ensemble:
            raise ValueError(
                f'ensemble is for method = "ensemble", not {self.method!r}; drop one of them'
            )
        if self.method == "ensemble" and self.options:
            raise ValueError("an ensemble has no options; give them to its members")
        return self

    @property
    def pairs_prompts(self) -> bool:
        """Whether prompt i of one set is the partner of prompt i of the other."""
        return "pca-paired" in {self.method, *(member.method for member in self.ensemble)}
