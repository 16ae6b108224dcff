"""The recipe's `[edit]` and `[search]`: what an edit preserves and which plans are tried.

See `recipe/recipe.py`.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_abliterate.recipe.section import Section
from ray_abliterate.recipe.space import SpaceSettings

Norm = Literal["none", "row", "column"]
InitialPointMeasure = Literal[
    "fisher", "auroc", "silhouette", "mutual-information", "log-odds", "none"
]


class EditSettings(Section):
    """What an edit preserves of each weight matrix."""

    norm: Norm = "row"
    """`row` preserves the norm of every output row, `column` that of every input feature, `none`
    neither."""


class SearchSettings(Section):
    """How many plans the search tries, and how it chooses them."""

    trials: int = Field(200, ge=1)
    """Number of plans to try."""
    startup_trials: int | None = Field(None, ge=0)
    """Random plans before the sampler learns; min(60, 0.3 x trials) if unset."""
    ei_candidates: int = Field(128, ge=1)
    """Candidates that the sampler compares for each plan."""
    seed: int = Field(0, ge=0)
    """Random seed of the sampler."""
    seeds: InitialPointMeasure = "fisher"
    """Initial points: begin with two plans, the middle of the space, and one layer's direction
    removed everywhere at full strength. With most measures, that layer's direction separates the
    prompt sets best, on prompts from which it was not computed; with `log-odds`, refusals decrease
    most without it, on the prompts of the first `refusal-log-odds` and `kl-divergence`. `none`: no
    such plans."""
    concurrency: int | None = Field(None, ge=1)
    """Plans evaluated at the same time; if unset, replicas times `trials_per_pass`, and one more
    waits."""
    batch_synchronous: bool = False
    """Choose and report plans in batches of `concurrency`: the same seed gives the same study,
    whatever the timing. Replicas wait for the slowest plan of each batch, and a second or two
    between batches."""
    trials_per_pass: int | Literal["auto"] = "auto"
    """Plans that a replica evaluates in shared passes, by virtual edits that leave the weights
    alone. It pays on GPUs, where a step costs the same for more rows; the sampler knows less when
    it chooses. `auto` is 1 on CPUs; on GPUs it is the largest of 8, 4, 2 and 1 whose rows fit one
    batch, and with which all replicas together hold no more than a tenth of `trials`, nor more than
    `concurrency`."""
    trial_timeout_seconds: float | None = Field(None, gt=0)
    """A trial that takes longer fails, and its replica is restarted."""
    dominance_stop: bool = True
    """Prune a trial once a finished one is certain to be better; its scores are then bounds."""
    space: SpaceSettings = Field(default_factory=SpaceSettings)
    """The ranges from which plans are drawn."""

    @field_validator("trials_per_pass", mode="before")
    @classmethod
    def _one_trial_or_more(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (number and value >= 1):
            raise ValueError("give a whole number of 1 or more, or `auto`")
        return value

    @model_validator(mode="after")
    def _batches_have_a_size(self) -> "SearchSettings":
        if self.batch_synchronous and self.concurrency is None:
            raise ValueError(
                "batch_synchronous needs concurrency, the number of plans in a batch; without it, "
                "the number would depend on how many replicas there are at the time"
            )
        if self.batch_synchronous and self.trials_per_pass not in ("auto", 1):
            raise ValueError(
                "batch_synchronous needs trials_per_pass = 1: which plans share a pass depends on "
                "timing, and changes the last digits of their scores"
            )
        return self

    @property
    def startup(self) -> int:
        """Random plans before the sampler learns: min(60, 0.3 n) unless the recipe sets them."""
        if self.startup_trials is not None:
            return self.startup_trials
        return min(60, int(0.3 * self.trials))
