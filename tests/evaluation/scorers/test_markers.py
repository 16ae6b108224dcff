"""Markers in growing texts: what is said early holds for the whole text."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_abliterate.evaluation.scorers.markers import FoldStream, Markers
from ray_abliterate.recipe.text_folding import fold

NASTY = (
    "abiIİßΣσςΑ *_`’‘“\"'  \n\tnt\u0301\u0327\u0f73\u0f74\u0f71\u1100\u1161\u11a8가é\u0344\ufb01ﬃ¨"
    "\u00a0\u3000\u0338=\u09c7\u09be\ufffd☺"
)
"""Letters that fold to several or by context, marks that combine, jamo that join, blanks."""
TEXTS = st.text(st.sampled_from(NASTY), max_size=14)
PHRASES = ("i am an ai", "b a", "ß", "sσ", "가", "é", "n't", "fi", "a", "i'")


def pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=600)
@given(TEXTS, st.lists(st.integers(0, 20), max_size=6))
@example("\u1100\u1161\u11a8=", [1, 2])
@example("e\u0f73\u0301", [1, 2])
def test_pieces_fold_to_what_the_whole_folds_to(text: str, cuts: list[int]) -> None:
    stream, folded = FoldStream(), ""
    for piece in pieces(text, cuts):
        folded += stream.push(piece)
        assert fold(text).startswith(folded)
    assert folded + stream.finish() == fold(text)


@settings(max_examples=600)
@given(TEXTS, st.lists(st.integers(0, 20), max_size=6))
def test_a_marker_found_early_is_in_the_whole_text(text: str, cuts: list[int]) -> None:
    markers = Markers(PHRASES)
    reader = markers.reader()
    early = [reader.read(piece) for piece in pieces(text, cuts)]
    expected = markers.in_folded(fold(text))
    assert expected or not any(early)
    assert reader.finish() == expected
    assert sorted(early) == early


@pytest.mark.parametrize(
    ("spoken", "at"),
    [
        (("I'm so", "rry", ", but"), 2),
        (("I’m *so", "rry*", "!"), 1),
        (("SO", "RRY", " "), 2),
        (("sor", "r", "y", "\u0301"), None),
        (("s", "o\n"), None),
    ],
)
def test_a_marker_across_pieces_is_seen_with_the_next_character(
    spoken: tuple[str, ...], at: int | None
) -> None:
    reader = Markers(["sorry"]).reader()
    found = [reader.read(piece) for piece in spoken]
    assert (found.index(True) if True in found else None) == at
