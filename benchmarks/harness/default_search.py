"""The search that benchmarks measure when any would do: default settings, a dense model's space."""

from ray_abliterate.recipe import Goal, SearchSettings, SpaceSettings
from ray_abliterate.search.plan import ModelShape
from ray_abliterate.search.space import SearchSpace

GOALS: list[tuple[str, Goal]] = [("rate", "minimize"), ("kl", "minimize")]
"""Names and goals of the two scores of a stand-in's trial."""


def default_space() -> SearchSpace:
    """Return the default search space of a dense model with 32 layers."""
    return SearchSpace.of(ModelShape(32, 4096, ("attn", "mlp")), SpaceSettings(), "row")


def default_settings(trials: int) -> SearchSettings:
    """Return the default settings of a search with so many trials."""
    return SearchSettings(trials=trials)
