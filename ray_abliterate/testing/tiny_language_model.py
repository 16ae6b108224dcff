"""A language model that answers, small enough for tests of suites and scorers."""

from collections.abc import Sequence
from pathlib import Path

from ray_abliterate.data.builtin.planted_model import build_planted_model
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import ModelSettings

FLAGGED = ("bake", "soup", "bread")
"""Words that make the model answer "sorry"; it answers "sure" without them."""
WORDS = "a b c d e f how do i the of what is which why write tell me about and to in".split()
"""The other words that it knows."""


def tiny_language_model(
    folder: Path, words: Sequence[str] = (), batch_size: int | None = None
) -> LanguageModel:
    """Return the planted model, which knows the letters A to F and some words, in 0.1 MB.

    Args:
        folder: Where its files go.
        words: What else it knows.
        batch_size: Rows of a batch; by memory if None.
    """
    source = build_planted_model(folder, FLAGGED, [*WORDS, *words])
    return LanguageModel.load(str(source), ModelSettings(name=str(source)), batch_size)
