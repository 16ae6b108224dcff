"""The recipe's `[evaluation]` and `[run]`: where suites are measured and what a run leaves behind.

See `recipe/recipe.py`.
"""

from pydantic import Field, field_validator, model_validator

from ray_abliterate.recipe.section import Section


class EvaluationSettings(Section):
    """The replicas that measure the suites."""

    replicas: int = Field(0, ge=0)
    """Replicas for suites alone, in addition to the search's: whatever enters the frontier is
    measured while the search goes on. With 0, the search's replicas measure the frontier after the
    search."""
    gpus_per_replica: float | None = Field(None, ge=0)
    """GPUs of one of them; a fraction shares a card. If unset, `model.gpus_per_replica`."""
    threads_per_replica: int | None = Field(None, ge=1)
    """CPU threads of one of them. If unset and without GPUs, they share half of a node's cores."""

    @field_validator("gpus_per_replica")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"{value} must be a fraction below 1, or a whole number of GPUs")
        return value

    @model_validator(mode="after")
    def _settings_have_replicas(self) -> "EvaluationSettings":
        if not self.replicas and (self.gpus_per_replica, self.threads_per_replica) != (None, None):
            raise ValueError(
                "gpus_per_replica and threads_per_replica are for the evaluation's own replicas, "
                "of which there are none; set replicas"
            )
        return self


class RunSettings(Section):
    """What the run leaves behind, and how it computes."""

    batch_size: int | None = Field(None, ge=1)
    """Prompts in a forward pass. If unset, it is chosen from the memory there is, once per run. It
    is part of the result: batches are the same on any number of replicas."""
    record_responses: bool = False
    """Save every trial's full answers under `responses/`, for `show --responses`."""
    dashboard: bool = True
    """Start Ray's dashboard when the run starts Ray; it listens on this machine only
    (127.0.0.1)."""
    save_residuals: bool = True
    """Save the residuals in the run directory, under `residuals/`; a resumed run reads them."""
    residual_cache: bool = True
    """Share residuals with other runs of the same model, prompts and batches, through the user's
    cache folder; see `docs/architecture.md`."""
