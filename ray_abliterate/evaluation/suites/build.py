"""Builds the suites of a recipe, those that ship and plug-ins, and runs their chunks.

for suite in build_suites(recipe.suites, base):
    results = [run_chunk(suite, model, chunk) for chunk in suite.chunks()]
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

GROUP = "ray_abliterate.suites"
"""The entry point group by which installed packages offer suites."""

SHIPPED: Mapping[str, str] = {
    "multiple-choice": "ray_abliterate.evaluation.suites.multiple_choice:MultipleChoice",
    "over-refusal": "ray_abliterate.evaluation.suites.over_refusal:OverRefusal",
    "kl": "ray_abliterate.evaluation.suites.kl_divergence:KlDivergenceSuite",
    "perplexity": "ray_abliterate.evaluation.suites.perplexity:Perplexity",
    "responses": "ray_abliterate.evaluation.suites.responses:Responses",
    "lm-eval": "ray_abliterate.evaluation.suites.lm_eval:LmEval",
}
"""Suites of this package, by `kind`. They are made from their own section of the recipe and the
recipe's folder; plug-ins are made from keyword arguments."""


def build_suites(settings: Sequence[SuiteSettings], base: Path) -> tuple[Suite, ...]:
    """Build the suites of a recipe, in its order. They can be pickled, and run without files.

    Args:
        settings: The recipe's `[[suites]]`.
        base: The recipe's folder.

    Raises:
        RecipeError: there is no such suite, or it refuses its options.
        ScoreError: the module of a suite can't be imported.
    """
    return tuple(_build(setting, base) for setting in settings)


def known_suite_kinds() -> tuple[str, ...]:
    """Return the values of `kind`: suites that ship, and those that installed packages offer."""
    return tuple(sorted({*SHIPPED, *(point.name for point in entry_points(group=GROUP))}))


def run_chunk(suite: Suite, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
    """Run one chunk, and check that the result is of what was asked.

    Raises:
        ScoreError: the chunk is another suite's; or its result is of other items, lacks a measure,
            or is not JSON.
    """
    if chunk.suite != suite.name:
        raise ScoreError(f"a chunk of the suite {chunk.suite!r} is not for {suite.name!r}")
    result = suite.run(model, chunk)
    expected = SuiteChunk.of(chunk)
    for field in ("suite", "chunk", "fingerprint", "group", "items"):
        if getattr(result, field) != getattr(expected, field):
            raise ScoreError(
                f"suite {suite.name!r}: the result of chunk {chunk.id} has the {field} "
                f"{getattr(result, field)!r}, not the chunk's own; "
                "make it with SuiteChunk.of(chunk)"
            )
    missing = {measure.name for measure in suite.measures} - result.values.keys()
    if missing:
        raise ScoreError(f"suite {suite.name!r}: chunk {chunk.id} has no values of {missing}")
    try:
        json.dumps(result.to_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ScoreError(
            f"suite {suite.name!r}: the result of chunk {chunk.id} is not JSON ({error})"
        ) from None
    return result


def _build(setting: SuiteSettings, base: Path) -> Suite:
    factory = _factory(setting)
    if not isinstance(setting, PluginSuite):
        suite = factory(setting, base)
    else:
        options: dict[str, Any] = {"name": setting.name}
        if setting.prompts is not None:
            options["prompts"] = load_prompt_set(setting.name, setting.prompts, base)
        if setting.table is not None:
            options["table"] = partial(stream_table, setting.table, base)
        owner = f"suite {setting.name!r} ({setting.kind})"
        suite = checked_call(owner, factory, {**options, **setting.options})
    if not isinstance(suite, Suite):
        raise RecipeError(
            f"suite {setting.name!r}: {setting.kind} made a {type(suite).__name__}, which lacks "
            "one of name, measures, chunks, run, summary, compare; see docs/extending.md"
        )
    return suite


def _factory(setting: SuiteSettings) -> Any:
    """Return what makes the suite: one that ships, one of a package, or `module:attribute`."""
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
