"""Markers in a text that is still being written: folded and searched piece by piece.

Folded text is what markers are compared with: NFKC, straight quotes, no markdown emphasis, case
folded, single blanks. `FoldStream` gives the same text in pieces as `fold` gives at once, and only
what no later character can change; so a marker found early is a marker of the whole text. Knows
nothing about models.
"""

import unicodedata
from collections.abc import Sequence

import ahocorasick

from ray_abliterate.errors import RecipeError
from ray_abliterate.recipe.text_folding import fold, fold_characters


class FoldStream:
    """`fold` for a text that comes in pieces.

    "".join of what `push` and then `finish` return is `fold` of the whole text.
    """

    def __init__(self) -> None:
        self._tail = ""
        """Characters that the next one may still combine with."""
        self._blank = False
        self._begun = False

    def push(self, text: str) -> str:
        """Add text; what is settled by now and was not before."""
        settled = self._settled(self._tail + text)
        done, self._tail = (self._tail + text)[:settled], (self._tail + text)[settled:]
        return self._single_blanks(fold_characters(done))

    def finish(self) -> str:
        """What was held back."""
        rest, self._tail = self._tail, ""
        return self._single_blanks(fold_characters(rest))

    def _settled(self, text: str) -> int:
        """Length of the beginning that no later character can change: up to the last character
        that begins anew, under NFKC, whatever stands before it."""
        start = 0
        for position in range(1, len(text)):
            if _begins_anew(text[position], text[start:position]):
                start = position
        return start

    def _single_blanks(self, characters: str) -> str:
        words = characters.split()
        if not words:
            self._blank |= bool(characters)
            return ""
        gap = self._begun and (self._blank or characters[0].isspace())
        self._begun, self._blank = True, characters[-1].isspace()
        return " " * gap + " ".join(words)


def _begins_anew(character: str, before: str) -> bool:
    """Neither it nor what follows it combines with, or sorts among, what stands before."""
    if character.isascii():
        return True
    first = unicodedata.normalize("NFKD", character)[0]
    if unicodedata.combining(first):
        return False
    apart = unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", character)
    return unicodedata.normalize("NFKC", before + character) == apart


class Markers:
    """A list of phrases, looked for all at once (Aho and Corasick 1975)."""

    def __init__(self, phrases: Sequence[str], owner: str = "markers") -> None:
        """Fold the phrases.

        Args:
            phrases: What to look for.
            owner: Who gave them, for errors.

        Raises:
            RecipeError: there is none, or one has nothing left after folding.
        """
        if not phrases:
            raise RecipeError(
                f"{owner}: markers = [] looks for nothing.\n"
                "  Give at least one phrase, or `broad` or `strict`."
            )
        self._automaton = ahocorasick.Automaton()
        self._reach = 0
        for phrase in phrases:
            folded = fold(phrase)
            if not folded:
                raise RecipeError(
                    f"{owner}: the marker {phrase!r} has nothing left when blanks and emphasis "
                    "(*, _) are taken out.\n  Leave it out, or give a phrase with letters."
                )
            self._automaton.add_word(folded, folded)
            self._reach = max(self._reach, len(folded) - 1)
        self._automaton.make_automaton()

    def found_in(self, folded: str) -> bool:
        """Whether folded text holds one."""
        return next(self._automaton.iter(folded), None) is not None

    def occur_in(self, text: str) -> bool:
        """Whether a text, not folded yet, holds a marker."""
        return self.found_in(fold(text))

    def reader(self) -> "MarkerReader":
        """Follows one text."""
        return MarkerReader(self, self._reach)


class MarkerReader:
    """Says when a text that is being written holds a marker, whatever comes after."""

    def __init__(self, markers: Markers, reach: int) -> None:
        """
        Args:
            markers: What to look for.
            reach: Characters of a text's end that a marker may have begun in.
        """
        self._stream = FoldStream()
        self._markers, self._reach = markers, reach
        self._end = ""
        self.found = False

    def read(self, text: str) -> bool:
        """Add text; True once a marker has been found.

        Looks at the new characters, and at as many before them as a marker may have begun in.
        """
        return self._look(self._stream.push(text))

    def finish(self) -> bool:
        """The text has ended: look at what was held back too."""
        return self._look(self._stream.finish())

    def _look(self, folded: str) -> bool:
        if not self.found and folded:
            text = self._end + folded
            self.found = self._markers.found_in(text)
            self._end = text[-self._reach :] if self._reach else ""
        return self.found
