"""The recipe's `[edit]` and `[search]`: what an edit keeps, which plans are tried; see
`recipe/recipe.py`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_abliterate.recipe.section import Section
from ray_abliterate.recipe.space import SpaceSettings

Norm = Literal["none", "row", "column"]
InitialPointMeasure = Literal[
    "fisher", "auroc", "silhouette", "mutual-information", "log-odds", "none"
]


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
    seeds: InitialPointMeasure = "fisher"
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
