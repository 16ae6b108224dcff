"""Searches for markers in a text that is still being written, folded piece by piece.

Markers are compared with folded text; see `recipe/text_folding.py`. `FoldStream` gives in pieces
the text that `fold` gives at once, and only what no later character can change; so a marker that
is found early is a marker of the whole text. Knows nothing about models.
"""

import unicodedata
from collections.abc import Sequence

import ahocorasick

from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe.text_folding import fold, fold_characters


class FoldStream:
    """Folds a text that comes in pieces.

    What `push` and then `finish` return, joined, is `fold` of the whole text.
    """

    def __init__(self) -> None:
        self._tail = ""
        """Characters that the next one may still combine with."""
        self._pending_blank = False
        self._begun = False

    def push(self, text: str) -> str:
        """Add text, and return what has become final with it."""
        text = self._tail + text
        final = self._final_length(text)
        done, self._tail = text[:final], text[final:]
        return self._single_blanks(fold_characters(done))

    def finish(self) -> str:
        """Return the rest, which was held back until the end of the text."""
        rest, self._tail = self._tail, ""
        return self._single_blanks(fold_characters(rest))

    def _final_length(self, text: str) -> int:
        """Return the length of the beginning that no later character can change.

        It reaches up to the last character that combines with nothing before it under NFKC.
        """
        start = 0
        for position in range(1, len(text)):
            if _stands_alone(text[position], text[start:position]):
                start = position
        return start

    def _single_blanks(self, characters: str) -> str:
        words = characters.split()
        if not words:
            self._pending_blank |= bool(characters)
            return ""
        gap = self._begun and (self._pending_blank or characters[0].isspace())
        self._begun, self._pending_blank = True, characters[-1].isspace()
        return " " * gap + " ".join(words)


def _stands_alone(character: str, before: str) -> bool:
    """Return whether a character, and so what follows it, leaves the text before it as it is.

    Combining marks and jamo compose with what stands before them, or are sorted among it.
    """
    if character.isascii():
        return True
    first = unicodedata.normalize("NFKD", character)[0]
    if unicodedata.combining(first):
        return False
    apart = unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", character)
    return unicodedata.normalize("NFKC", before + character) == apart


class Markers:
    """A list of phrases that are searched for all at once (Aho and Corasick 1975)."""

    def __init__(self, phrases: Sequence[str], owner: str = "markers") -> None:
        """Fold the phrases.

        Args:
            phrases: What to search for.
            owner: What errors call the list of phrases.

        Raises:
            RecipeError: there is no phrase, or one has nothing left after folding.
        """
        if not phrases:
            raise RecipeError(
                f"{owner}: markers = [] matches nothing.\n"
                "  Give at least one phrase, or `broad` or `strict`."
            )
        self._automaton = ahocorasick.Automaton()
        self._reach = 0
        for phrase in phrases:
            folded = fold(phrase)
            if not folded:
                raise RecipeError(
                    f"{owner}: the marker {phrase!r} is empty without blanks and emphasis (*, _).\n"
                    "  Leave it out, or give a phrase with letters."
                )
            self._automaton.add_word(folded, folded)
            self._reach = max(self._reach, len(folded) - 1)
        self._automaton.make_automaton()

    def in_folded(self, folded: str) -> bool:
        """Return whether folded text holds a marker."""
        return next(self._automaton.iter(folded), None) is not None

    def in_text(self, text: str) -> bool:
        """Return whether a text that is not folded yet holds a marker."""
        return self.in_folded(fold(text))

    def reader(self) -> "MarkerReader":
        """Return a reader that follows one text."""
        return MarkerReader(self, self._reach)


class MarkerReader:
    """Finds out, while a text is being written, whether it holds a marker, whatever comes next.

    Attributes:
        has_marker: A marker has been found.
    """

    def __init__(self, markers: Markers, reach: int) -> None:
        """
        Args:
            markers: What to search for.
            reach: Characters at the end of a text in which a marker may have begun.
        """
        self._stream = FoldStream()
        self._markers, self._reach = markers, reach
        self._tail = ""
        self.has_marker = False

    def read(self, text: str) -> bool:
        """Add text, and return whether a marker has been found.

        Only the new characters are searched, and those before in which a marker may have begun.
        """
        return self._search(self._stream.push(text))

    def finish(self) -> bool:
        """End the text, and search what was held back too."""
        return self._search(self._stream.finish())

    def _search(self, folded: str) -> bool:
        if not self.has_marker and folded:
            text = self._tail + folded
            self.has_marker = self._markers.in_folded(text)
            self._tail = text[-self._reach :] if self._reach else ""
        return self.has_marker
