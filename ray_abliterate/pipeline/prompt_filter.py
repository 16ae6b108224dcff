"""Leaves out of extraction the prompts that the base model answers against their set.

A behaviour prompt that the model simply answers pulls the direction towards nothing, and so does a
neutral one that it declines. The recipe's own scorer judges the base model's answers, in fixed
batches on all replicas; verdicts are stored as they come, so that a stopped run goes on.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.residuals.shard import content_key
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.model.batch_size import Tuning, largest_power_of_two
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ReplicaApi
from ray_abliterate.version import __version__

log = logging.getLogger(__name__)

CONTRADICTION = {
    "behaviour": "{} whose base-model answer does not show the behaviour",
    "neutral": "{} whose base-model answer shows the behaviour",
}
WANTED = {"behaviour": True, "neutral": False}
"""By set: whether an answer has to show the behaviour for its prompt to stay."""

BehaviourVerdict = bool | None
"""Whether an answer shows the behaviour; None if it is unclear."""


@dataclass(frozen=True)
class FilteredSet:
    """What filtering did to one prompt set; the fields are stored in `environment.json`.

    Attributes:
        prompts: Number of prompts before.
        kept: Number of prompts after.
        contradicting: Left out because the answer shows the opposite of what the set is for.
        unclear: Left out because the answer is empty, degenerate, or can't be judged.
        left_out: Positions in the set, from 0, of the prompts that are left out.
        fingerprint: Of the prompts that are kept.
    """

    prompts: int
    kept: int
    contradicting: int
    unclear: int
    left_out: tuple[int, ...]
    fingerprint: str


class BaseModelVerdicts:
    """Has the replicas answer and judge prompt sets in fixed batches; each batch is asked once."""

    def __init__(self, context: RunContext, prefix: tuple[int, ...], tuning: Tuning) -> None:
        """Fix the batches, and what a stored verdict has to agree with.

        Args:
            context: The run; its recipe has a scorer that tests for the behaviour.
            prefix: Token ids that all answers begin with.
            tuning: Batch sizes that fit in memory.
        """
        test = context.recipe.behaviour_test
        assert test is not None
        self._context, self._prefix, self._tuning = context, prefix, tuning
        rows = context.recipe.run.batch_size or largest_power_of_two(tuning.answer_rows)
        self._rows = rows
        facts = context.pool.facts
        self._content: dict[str, Any] = {
            "weights": facts.fingerprint,
            "revision": facts.revision,
            "model_dtype": facts.dtype,
            "computes": facts.computes,
            "template": facts.template,
            "response_prefix": prefix,
            "test": test.model_dump(mode="json", exclude={"name", "goal", "prompts"}),
            "versions": [__version__, version("torch"), version("transformers")],
        }

    def judge(self, sets: Sequence[PromptSet]) -> dict[str, list[BehaviourVerdict]]:
        """Return the verdict on the base model's answer to each prompt, by set, in order."""
        directory, step = self._context.directory, self._context.progress.step
        batches = {
            (s.name, number * self._rows): prompts
            for s in sets
            for number, prompts in s.batches(self._rows)
        }
        keys = {batch: self._key(prompts) for batch, prompts in batches.items()}
        verdicts = {
            (line["set"], line["first"]): line["shows"]
            for line in directory.verdicts()
            if line["key"] == keys.get((line["set"], line["first"]))
        }
        calls = [
            (*batch, prompts, self._prefix, self._tuning)
            for batch, prompts in batches.items()
            if batch not in verdicts
        ]
        step(len(verdicts), len(batches))
        for name, first, shows in self._context.pool.map(ReplicaApi.shows_behaviour, calls):
            line = {"set": name, "first": first, "key": keys[name, first], "shows": shows}
            directory.append_verdicts(line)
            verdicts[name, first] = shows
            step(len(verdicts), len(batches))
        return {
            s.name: [
                verdict for batch in batches if batch[0] == s.name for verdict in verdicts[batch]
            ]
            for s in sets
        }

    def _key(self, prompts: Sequence[Prompt]) -> str:
        return content_key(**self._content, prompts=PromptSet("", tuple(prompts)).fingerprint)


def refuse_small(recipe: Recipe, sets: Sequence[PromptSet]) -> None:
    """Make sure, before a model is loaded, that filtering can leave enough prompts.

    Raises:
        PromptSourceError: a set has fewer prompts than have to remain.
    """
    least = recipe.prompts.least_prompts
    for prompts in sets if recipe.prompts.filter_by_behaviour else ():
        if len(prompts) < least:
            raise PromptSourceError(
                f"prompts.{prompts.name} has {len(prompts)} prompts, and prompts.least_prompts = "
                f"{least} have to remain after filtering.\n"
                "  Give more prompts, or set prompts.least_prompts lower."
            )


def refuse_alike(recipe: Recipe, behaviour: PromptSet, neutral: PromptSet) -> list[str]:
    """Make sure, before a model is loaded, that there can be a direction between two sets.

    Returns:
        A sentence about prompts that are in both sets, if there are any.

    Raises:
        PromptSourceError: they are the same prompts, or can't be paired as the method needs.
    """
    shared = {*behaviour.prompts} & {*neutral.prompts}
    if shared == {*behaviour.prompts, *neutral.prompts}:
        raise PromptSourceError(
            f"prompts.behaviour and prompts.neutral are the same {len(shared)} prompts, so there "
            "is no direction between them.\n"
            "  Give prompts that show the behaviour, and others that don't."
        )
    if recipe.direction.pairs_prompts and len(behaviour) != len(neutral):
        raise PromptSourceError(
            f"pca-paired needs sets of equal size, prompt by prompt; prompts.behaviour has "
            f"{len(behaviour)}, and prompts.neutral {len(neutral)}.\n"
            "  Give a partner to each prompt, or choose another direction.method."
        )
    if not shared:
        return []
    sentence = (
        f"{len(shared)} prompts are in both prompts.behaviour and prompts.neutral; they say "
        "nothing about the behaviour, and draw the means of the two sets together."
    )
    log.warning("%s", sentence)
    return [sentence]


def filter_by_behaviour(
    context: RunContext, sets: Sequence[PromptSet], verdicts: BaseModelVerdicts
) -> list[PromptSet]:
    """Return the prompts of both sets whose base answers agree with their set.

    What is left out is recorded in `environment.json`, and shown in a sentence for each set: as a
    warning if prompts were left out of any, as a note otherwise.

    Args:
        context: The run; its recipe says which scorer judges, and how many prompts must be left.
        sets: Behaviour and neutral prompts.
        verdicts: Asks the replicas.

    Raises:
        PromptSourceError: a set is left with too few prompts.
    """
    recipe, directory = context.recipe, context.directory
    test, least = recipe.behaviour_test, recipe.prompts.least_prompts
    assert test is not None
    with context.progress.stage("prompt filter"):
        judged = verdicts.judge(sets)
    filtered = {s.name: _filtered(s, judged[s.name]) for s in sets}
    for name, outcome in filtered.items():
        if outcome.kept < least:
            raise PromptSourceError(_too_few(name, outcome, test.name, least))
    facts = {name: asdict(outcome) for name, outcome in filtered.items()}
    directory.record_facts(filtered={"test": test.name, **facts})
    for line in left_out_lines(directory.read_environment()):
        if any(outcome.left_out for outcome in filtered.values()):
            context.record.warn(line)
        else:
            context.progress.note(line)
    return [
        s.subset(i for i in range(len(s)) if i not in set(filtered[s.name].left_out)) for s in sets
    ]


def _filtered(prompts: PromptSet, verdicts: Sequence[BehaviourVerdict]) -> FilteredSet:
    wanted = WANTED[prompts.name]
    left_out = tuple(i for i, shows in enumerate(verdicts) if shows is not wanted)
    unclear = sum(shows is None for shows in verdicts)
    kept = [i for i, shows in enumerate(verdicts) if shows is wanted]
    fingerprint = prompts.subset(kept).fingerprint if kept else ""
    contradicting = len(left_out) - unclear
    return FilteredSet(len(prompts), len(kept), contradicting, unclear, left_out, fingerprint)


def left_out_lines(environment: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each set of a run whose prompts were filtered.

    Args:
        environment: Of the run directory.
    """
    recorded = environment.get("filtered", {})
    for name in WANTED:
        if name in recorded:
            outcome = FilteredSet(**recorded[name])
            text = f"prompts.{name}: {_counts(name, outcome)}"
            yield f"{text} (scorer {recorded['test']!r})" + (
                ". Which ones: environment.json, filtered" if outcome.left_out else ""
            )


def _counts(name: str, outcome: FilteredSet) -> str:
    if not outcome.left_out:
        return f"all {outcome.prompts} prompts agree with the base model's answers"
    reasons = []
    if outcome.contradicting:
        reasons.append(CONTRADICTION[name].format(outcome.contradicting))
    if outcome.unclear:
        reasons.append(f"{outcome.unclear} whose answer is empty, degenerate or unclear")
    left_out = f"{len(outcome.left_out)} of {outcome.prompts} prompts are left out"
    return f"{left_out}: {', '.join(reasons)}"


def _too_few(name: str, outcome: FilteredSet, test: str, least: int) -> str:
    suitable = {
        "behaviour": "that the model shows the behaviour on",
        "neutral": "that it answers without showing it",
    }
    left = f"{outcome.kept} are left" if outcome.kept else "none is left"
    return (
        f"prompts.{name}: {_counts(name, outcome)} (scorer {test!r}); {left}, and "
        f"prompts.least_prompts is {least}.\n"
        f"  Give prompts {suitable[name]}, look at what the scorer {test!r} counts, set "
        "prompts.least_prompts lower,\n  or take the sets as they are with "
        "prompts.filter_by_behaviour = false."
    )
