"""The suites that ship, how others are found, and the one way to run a chunk.

suites = build(recipe.suites, base)
for suite in suites:
    results = [measure(suite, model, chunk) for chunk in suite.chunks()]
    scores = suite.summary(results)
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ray_abliterate.data.prompt_sources import load_prompt_set
from ray_abliterate.data.tables import stream_table
from ray_abliterate.errors import RecipeError, ScoreError
from ray_abliterate.evaluation.suites.suite import (
    Chunk,
    Suite,
    SuiteChunk,
    SuiteModel,
)
from ray_abliterate.recipe import SuiteSettings
from ray_abliterate.recipe.parsing import suggestion
from ray_abliterate.recipe.plugins import checked_call, resolve
from ray_abliterate.recipe.suites import PluginSuite

__all__ = [
    "build_suites",
    "known_suite_kinds",
    "run_chunk",
]

GROUP = "ray_abliterate.evaluation.suites"
"""Entry points by which installed packages offer suites."""

SHIPPED: Mapping[str, str] = {
    "multiple-choice": "ray_abliterate.evaluation.suites.multiple_choice:MultipleChoice",
    "over-refusal": "ray_abliterate.evaluation.suites.over_refusal:OverRefusal",
    "kl": "ray_abliterate.evaluation.suites.kl_divergence:KlDivergenceSuite",
    "perplexity": "ray_abliterate.evaluation.suites.perplexity:Perplexity",
    "responses": "ray_abliterate.evaluation.suites.responses:Responses",
    "lm-eval": "ray_abliterate.evaluation.suites.lm_eval:LmEval",
}
"""Suites of this package. Those with a section of their own in the recipe are made from it and the
recipe's folder, others as suites of one's own are, from keyword arguments."""


def build_suites(settings: Sequence[SuiteSettings], base: Path) -> tuple[Suite, ...]:
    """The suites of a recipe, in its order. They can be pickled, and run without files.

    Args:
        settings: As the recipe has them.
        base: The recipe's folder.

    Raises:
        RecipeError: there is no such suite, or it refuses its options.
        ScoreError: the module of a suite can't be imported.
    """
    return tuple(_build(setting, base) for setting in settings)


def known_suite_kinds() -> tuple[str, ...]:
    """Names that `kind` can have: of suites that ship, and of those that packages offer."""
    return tuple(sorted({*SHIPPED, *(point.name for point in entry_points(group=GROUP))}))


def run_chunk(suite: Suite, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
    """Run one chunk, and hold the result against what was asked.

    Raises:
        ScoreError: the chunk is another suite's; or the result is of other items, or no JSON.
    """
    if chunk.suite != suite.name:
        raise ScoreError(f"a chunk of the suite {chunk.suite!r} is not for {suite.name!r}")
    found = suite.run(model, chunk)
    asked = SuiteChunk.of(chunk)
    for label in ("suite", "chunk", "fingerprint", "group", "items"):
        if getattr(found, label) != getattr(asked, label):
            raise ScoreError(
                f"suite {suite.name!r}: the result of chunk {chunk.id} has the {label} "
                f"{getattr(found, label)!r}, not the chunk's own; make it with SuiteChunk.of(chunk)"
            )
    missing = {known.name for known in suite.measures} - found.values.keys()
    if missing:
        raise ScoreError(f"suite {suite.name!r}: chunk {chunk.id} has no values of {missing}")
    try:
        json.dumps(found.to_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ScoreError(f"suite {suite.name!r}: chunk {chunk.id} is no JSON ({error})") from None
    return found


def _build(setting: SuiteSettings, base: Path) -> Suite:
    make = _found(setting)
    if not isinstance(setting, PluginSuite):
        made = make(setting, base)
    else:
        options: dict[str, Any] = {"name": setting.name}
        if setting.prompts is not None:
            options["prompts"] = load_prompt_set(setting.name, setting.prompts, base)
        if setting.table is not None:
            options["table"] = partial(stream_table, setting.table, base)
        owner = f"suite {setting.name!r} ({setting.kind})"
        made = checked_call(owner, make, {**options, **setting.options})
    if not isinstance(made, Suite):
        raise RecipeError(
            f"suite {setting.name!r}: {setting.kind} made a {type(made).__name__}, which lacks one "
            "of name, measures, chunks, run, summary, compare; see docs/extending.md"
        )
    return made


def _found(setting: SuiteSettings) -> Any:
    """What makes the suite: one that ships, one that a package offers, or `module:attribute`."""
    kind = setting.kind
    if kind in SHIPPED:
        return resolve(SHIPPED[kind])
    if ":" in kind:
        return resolve(kind)
    offered: list[EntryPoint] = [p for p in entry_points(group=GROUP) if p.name == kind]
    if not offered:
        known = known_suite_kinds()
        raise RecipeError(
            f"suite {setting.name!r}: there is no suite {kind!r}.{suggestion(kind, known)}\n"
            f"  Known: {', '.join(known)}; others come with a package that has an entry point "
            f"{GROUP!r},\n  or are named as module:attribute."
        )
    return resolve(offered[0].value)
