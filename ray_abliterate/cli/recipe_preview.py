"""Preview what a recipe names before it runs: prompt sets, and the tables of suites.

What is on this machine is read to its end; of a data set on the Hub, only a few rows.
"""

from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ray_abliterate.data.prompt_sources import load_prompt_set
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.recipe import PromptSource, TableSource
from ray_abliterate.recipe.suites import SuiteSettings

HUB_ROWS = 8
"""Rows that are read of a data set on the Hub."""

Source = TypeVar("Source", bound=TableSource)


def preview_prompts(name: str, source: PromptSource, base: Path) -> tuple[PromptSet, bool]:
    """Read a prompt set, and return whether these are its first rows only.

    Raises:
        PromptSourceError: it cannot be read.
    """
    first, is_part = _first_rows(source, base)
    return load_prompt_set(name, first, base), is_part


def preview_suite(setting: SuiteSettings, base: Path) -> str:
    """Return in a few words what a suite would ask.

    Args:
        setting: The suite, as the recipe has it.
        base: The recipe's folder.

    Raises:
        RayAbliterateError: there is no such suite, a file is missing, or a row cannot be asked.
    """
    sources: dict[str, Any] = {}
    is_part = False
    for name in ("table", "examples", "prompts"):
        source = getattr(setting, name, None)
        if source is None:
            continue
        sources[name], is_remote = (
            _first_rows(source, base) if name == "prompts" else (source, _is_on_hub(source, base))
        )
        is_part = is_part or is_remote
    (suite,) = build_suites([setting.model_copy(update=sources)], base)
    chunks = islice(suite.chunks(), 1 if is_part else None)
    count = sum(len(chunk.items) for chunk in chunks)
    return f"{setting.kind}, {'first ' if is_part else ''}{count} items"


def _first_rows(source: Source, base: Path) -> tuple[Source, bool]:
    """Return a source's first rows if it is on the Hub, and whether it is."""
    if not _is_on_hub(source, base):
        return source, False
    start, stop = source.bounds
    last = min(start + HUB_ROWS, stop or start + HUB_ROWS)
    return source.model_copy(update={"split": f"{source.split_name}[{start}:{last}]"}), True


def _is_on_hub(source: TableSource, base: Path) -> bool:
    return bool(source.dataset) and not (base / str(source.dataset)).exists()
