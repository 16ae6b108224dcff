"""Looks into what a recipe names before a run does: prompt sets, and the tables of suites.

What lies here is read to its end; of the Hub, a few rows are asked for.
"""

from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ray_abliterate.data.prompt_sources import load_prompt_set
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.recipe import PromptSource, TableSource
from ray_abliterate.recipe.suites import SuiteSettings

ROWS = 8
"""Rows that are read of a Hub data set."""

Source = TypeVar("Source", bound=TableSource)


def read(name: str, source: PromptSource, base: Path) -> tuple[PromptSet, bool]:
    """A prompt set, and whether these are its first rows only.

    Raises:
        PromptSourceError: it can't be read.
    """
    few, partly = _few(source, base)
    return load_prompt_set(name, few, base), partly


def asked(setting: SuiteSettings, base: Path) -> str:
    """What a suite would ask.

    Args:
        setting: As the recipe has it.
        base: The recipe's folder.

    Raises:
        RayAbliterateError: there is no such suite, or it would ask what can't be asked: a file is
            missing, a row has no answer.
    """
    few: dict[str, Any] = {}
    partly = False
    for name in ("table", "examples", "prompts"):
        source = getattr(setting, name, None)
        if source is None:
            continue
        few[name], on_hub = (
            _few(source, base) if name == "prompts" else (source, _hub(source, base))
        )
        partly = partly or on_hub
    (suite,) = build_suites([setting.model_copy(update=few)], base)
    chunks = islice(suite.chunks(), 1 if partly else None)
    count = sum(len(chunk.items) for chunk in chunks)
    return f"{setting.kind}, {'first ' if partly else ''}{count} items"


def _few(source: Source, base: Path) -> tuple[Source, bool]:
    """Its first rows, and whether it is that."""
    if not _hub(source, base):
        return source, False
    start, stop = source.bounds
    last = min(start + ROWS, stop or start + ROWS)
    return source.model_copy(update={"split": f"{source.split_name}[{start}:{last}]"}), True


def _hub(source: TableSource, base: Path) -> bool:
    return bool(source.dataset) and not (base / str(source.dataset)).exists()
