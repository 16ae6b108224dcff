"""How the replicas of a run compute: batch sizes and shared passes, chosen by the first of them."""

from collections.abc import Mapping

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.model.batch_size import BatchMemory, TrialRows, Tuning, choose_trials_per_pass
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.model_facts import most_plans_per_pass


def longest_lengths(
    model: LanguageModel, recipe: Recipe, prompts: Mapping[str, PromptSet]
) -> tuple[int, int]:
    """Return the tokens of the longest scored prompt, and of the longest answer."""
    lengths = [len(row) for s in prompts.values() for row in model.encode(s.prompts)]
    limits = [
        getattr(scorer, name, 0)
        for scorer in recipe.scorers
        for name in ("max_new_tokens", "tokens")
    ]
    return max(lengths, default=1), max([*limits, 1])


def choose_tuning(
    model: LanguageModel,
    cache: WeightCache,
    recipe: Recipe,
    prompts: Mapping[str, PromptSet],
    replicas: int,
) -> Tuning:
    """Choose batch sizes and trials per pass by memory and speed of this replica's device.

    Args:
        model: The model, as it was loaded.
        cache: Its writers' pristine weights.
        recipe: What is scored, and in how many trials.
        prompts: The scorers' prompt sets.
        replicas: Number of replicas of the run.

    Raises:
        ModelError: not even one row fits into memory.
    """
    prompt, answer = longest_lengths(model, recipe, prompts)
    tokens = sum(len(row) for s in prompts.values() for row in model.encode(s.prompts))
    per_pass = recipe.search.trials_per_pass
    if per_pass == "auto":
        rows = max(map(len, prompts.values()), default=1)
        per_pass = choose_trials_per_pass(
            recipe.search,
            replicas,
            most_plans_per_pass(model, cache, (prompt, answer))[0],
            BatchMemory(model.device, model.free_bytes, model.memory_cost),
            TrialRows(min(rows, model.batch_size or rows), prompt, answer),
        )
    return model.tune(prompt, answer, tokens, per_pass)
