"""Label hygiene: prompts that the base model answers against their set are left out of extraction.

A "shows it" prompt that the model simply answers pulls the direction towards nothing, and so does a
neutral one that it declines. Which these are, the recipe's own scorer says of the base model's
answers, in fixed batches on all replicas; what is known is kept, so that a stopped run goes on.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from ray_abliterate import __version__
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.residuals.shard import content_key
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.model.batch_size import Tuning, steady
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.recipe import Recipe

log = logging.getLogger(__name__)

CONTRADICTS = {
    "behaviour": "to {} the base model's answer does not show the behaviour",
    "neutral": "to {} the base model's answer shows the behaviour",
}
WANTED = {"behaviour": True, "neutral": False}
"""What an answer has to show for its prompt to stay."""

Shown = bool | None
"""Whether an answer shows the behaviour; None: it can't be told."""


@dataclass(frozen=True)
class Filtered:
    """What came of one set.

    Attributes:
        prompts: How many there were.
        kept: How many there are now.
        contradicting: Left out because the answer shows the opposite of what the set is for.
        unclear: Left out because the answer shows nothing: empty, degenerate, not to be judged.
        left_out: Their places in the set, from 0.
        fingerprint: Of the prompts that are kept.
    """

    prompts: int
    kept: int
    contradicting: int
    unclear: int
    left_out: tuple[int, ...]
    fingerprint: str


class Answering:
    """Has the replicas answer prompt sets, batch by batch; batches that are known aren't asked."""

    def __init__(
        self,
        pool: Any,
        recipe: Recipe,
        directory: RunDirectory,
        prefix: tuple[int, ...],
        tuning: Tuning,
    ) -> None:
        """Ask nothing yet."""
        test = recipe.behaviour_test
        assert test is not None
        self._pool, self._directory = pool, directory
        self._prefix, self._tuning = prefix, tuning
        self._rows = recipe.run.batch_size or steady(tuning.answer_rows)
        facts = pool.facts
        self._same = {
            "weights": facts.fingerprint,
            "revision": facts.revision,
            "model_dtype": facts.dtype,
            "computes": facts.computes,
            "template": facts.template,
            "response_prefix": prefix,
            "test": test.model_dump(mode="json", exclude={"name", "goal", "prompts"}),
            "versions": [__version__, version("torch"), version("transformers")],
        }

    def shown(self, sets: Sequence[PromptSet], watch: Watch) -> dict[str, list[Shown]]:
        """What the base model's answer to each prompt shows, by set."""
        batches = {
            (s.name, number * self._rows): prompts
            for s in sets
            for number, prompts in s.batches(self._rows)
        }
        keys = {place: self._key(prompts) for place, prompts in batches.items()}
        found = {
            (line["set"], line["first"]): line["shows"]
            for line in self._directory.verdicts()
            if line["key"] == keys.get((line["set"], line["first"]))
        }
        calls = [
            (*place, prompts, self._prefix, self._tuning)
            for place, prompts in batches.items()
            if place not in found
        ]
        watch.step(len(found), len(batches))
        for name, first, shows in self._pool.map("shows", calls):
            line = {"set": name, "first": first, "key": keys[name, first], "shows": shows}
            self._directory.append_verdicts(line)
            found[name, first] = shows
            watch.step(len(found), len(batches))
        return {s.name: [one for place in batches if place[0] == s.name for one in found[place]]
                for s in sets}  # fmt: skip

    def _key(self, prompts: Sequence[Prompt]) -> str:
        return content_key(**self._same, prompts=PromptSet("", tuple(prompts)).fingerprint)


def refuse_small(recipe: Recipe, sets: Sequence[PromptSet]) -> None:
    """Make sure, before a model is loaded, that there are enough prompts to leave some out.

    Raises:
        PromptSourceError: a set has fewer prompts than have to be left.
    """
    least = recipe.prompts.least_prompts
    for prompts in sets if recipe.prompts.filter_by_behaviour else ():
        if len(prompts) < least:
            raise PromptSourceError(
                f"prompts.{prompts.name} has {len(prompts)} prompts, and prompts.least_prompts = "
                f"{least} have to be left after filtering.\n"
                "  Give more prompts, or set prompts.least_prompts lower."
            )


def refuse_alike(recipe: Recipe, behaviour: PromptSet, neutral: PromptSet) -> list[str]:
    """Make sure, before a model is loaded, that there can be a direction between two sets.

    Returns a sentence about prompts that are in both, if there are any.

    Raises:
        PromptSourceError: they are the same prompts, or can't be pairs as the method needs them.
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
        "nothing about the behaviour, and bring the means of the sets together."
    )
    log.warning("%s", sentence)
    return [sentence]


def agreeing(
    sets: Sequence[PromptSet],
    answering: Answering,
    recipe: Recipe,
    directory: RunDirectory,
    warn: Callable[[str], None],
    watch: Watch,
) -> list[PromptSet]:
    """The prompts of both sets whose base answers agree with their set; says what is left out.

    Args:
        sets: Behaviour and neutral prompts.
        answering: Asks the replicas.
        recipe: Says which scorer tells, and how many prompts have to be left.
        directory: Keeps what was found.
        warn: Is told what was left out, once per set.
        watch: Is told how far it is.

    Raises:
        PromptSourceError: a set is left with too few prompts.
    """
    test = recipe.behaviour_test
    assert test is not None
    with watch.stage("label hygiene"):
        shown = answering.shown(sets, watch)
    found = {s.name: _filtered(s, shown[s.name]) for s in sets}
    for name, one in found.items():
        if one.kept < recipe.prompts.least_prompts:
            raise PromptSourceError(_too_few(name, one, test.name, recipe.prompts.least_prompts))
    directory.note(filtered={"test": test.name, **{n: asdict(one) for n, one in found.items()}})
    for line in left_out_lines(directory.environment):
        if any(one.left_out for one in found.values()):
            warn(line)
        else:
            watch.note(line)
    return [
        s.only(place for place in range(len(s)) if place not in set(found[s.name].left_out))
        for s in sets
    ]


def _filtered(prompts: PromptSet, shown: Sequence[Shown]) -> Filtered:
    wanted = WANTED[prompts.name]
    left_out = tuple(place for place, shows in enumerate(shown) if shows is not wanted)
    unclear = sum(shows is None for shows in shown)
    kept = [place for place, shows in enumerate(shown) if shows is wanted]
    fingerprint = prompts.only(kept).fingerprint if kept else ""
    contradicting = len(left_out) - unclear
    return Filtered(len(prompts), len(kept), contradicting, unclear, left_out, fingerprint)


def left_out_lines(environment: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each set of a run whose prompts were filtered; none if they weren't."""
    known = environment.get("filtered", {})
    for name in WANTED:
        if name in known:
            own = Filtered(**known[name])
            text = f"prompts.{name}: {_counts(name, own)}"
            yield f"{text} (scorer {known['test']!r})" + (
                ". Which ones: environment.json, filtered" if own.left_out else ""
            )


def _counts(name: str, own: Filtered) -> str:
    if not own.left_out:
        return f"all {own.prompts} prompts agree with the base model's answers"
    why = [CONTRADICTS[name].format(own.contradicting)] if own.contradicting else []
    why += [f"{own.unclear} answers are empty, degenerate or unclear"] if own.unclear else []
    return f"{len(own.left_out)} of {own.prompts} prompts are left out: {', '.join(why)}"


def _too_few(name: str, own: Filtered, test: str, least: int) -> str:
    prompts = {
        "behaviour": "that the model shows the behaviour on",
        "neutral": "that it answers without",
    }
    left = f"{own.kept} are left" if own.kept else "none is left"
    return (
        f"prompts.{name}: {_counts(name, own)} (scorer {test!r}); {left}, and "
        f"prompts.least_prompts is {least}.\n"
        f"  Give prompts {prompts[name]}, look at what the scorer {test!r} counts, set "
        "prompts.least_prompts lower,\n  or take the sets as they are with "
        "prompts.filter_by_behaviour = false."
    )
