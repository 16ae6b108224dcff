"""Folded text: what markers of a behaviour are compared with, and what a recipe's markers must be.

Folded text is in NFKC, with straight quotes, without markdown emphasis, case-folded, and with
single blanks. Knows nothing about models.
"""

import unicodedata

_TRANSLATION = str.maketrans(
    {"’": "'", "‘": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "*": None, "_": None}
)


def fold(text: str) -> str:
    """Return a text in the form that markers are compared with."""
    return " ".join(fold_characters(text).split())


def fold_characters(text: str) -> str:
    """Fold everything but blanks: character by character, once the text is in NFKC."""
    return unicodedata.normalize("NFKC", text).translate(_TRANSLATION).casefold()
