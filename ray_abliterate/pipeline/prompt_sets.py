"""The prompt sets of a run: read from the recipe's sources, and compared with a resumed run's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.data.prompt_sources import load_prompt_set, warn_on_overlap
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.methods.recipe_methods import refuse_unknown_methods
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.pipeline.prompt_filter import refuse_alike, refuse_small
from ray_abliterate.recipe import PluginScorer, Recipe
from ray_abliterate.recipe.plugins import resolve


@dataclass(frozen=True)
class PromptSets:
    """All prompt sets of a run.

    Attributes:
        behaviour: Prompts that show the behaviour ("harmful" in Arditi et al., positive in repeng).
        neutral: Prompts that don't ("harmless", negative).
        scored: Held-out prompts of the scorers, by the scorer's name.
    """

    behaviour: PromptSet
    neutral: PromptSet
    scored: dict[str, PromptSet]

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return the origin, size and fingerprint of each set, by name."""
        named = {"behaviour": self.behaviour, "neutral": self.neutral, **self.scored}
        return {
            name: {"origin": s.origin, "prompts": len(s), "fingerprint": s.fingerprint}
            for name, s in named.items()
        }


def load_prompts(
    recipe: Recipe, directory: RunDirectory, base: Path, progress: Progress
) -> PromptSets:
    """Read all prompt sets; on a resumed run, make sure that they are the same ones.

    Scorers and direction methods that the recipe takes from modules are looked up first, so that
    a wrong name is reported before anything is read.

    Raises:
        PromptSourceError: a set cannot be read, or is not what the run began with.
    """
    for scorer in recipe.scorers:
        if isinstance(scorer, PluginScorer):
            resolve(scorer.kind)
    refuse_unknown_methods(recipe.direction)
    with progress.stage("prompts"):
        pairs = recipe.direction.pairs_prompts
        sets = PromptSets(
            load_prompt_set("behaviour", recipe.prompts.behaviour, base, pairs),
            load_prompt_set("neutral", recipe.prompts.neutral, base, pairs),
            {
                scorer.name: load_prompt_set(scorer.name, scorer.prompts, base)
                for scorer in recipe.scorers
                if scorer.prompts is not None
            },
        )
    refuse_small(recipe, (sets.behaviour, sets.neutral))
    alike = refuse_alike(recipe, sets.behaviour, sets.neutral)
    recorded = directory.read_environment().get("prompts")
    for name, facts in sets.facts().items():
        if recorded is not None and recorded[name]["fingerprint"] != facts["fingerprint"]:
            raise PromptSourceError(
                f"the prompts of {name!r} are not the ones the run began with "
                f"({facts['origin']}).\n  Put them back, or start a new run with --to."
            )
    if recorded is None:
        overlaps = warn_on_overlap([sets.behaviour, sets.neutral], list(sets.scored.values()))
        folders = {"base": str(base.resolve()), "base_given": str(base)}
        directory.record_facts(prompts=sets.facts(), warnings=[*alike, *overlaps], **folders)
    return sets
