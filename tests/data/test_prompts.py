"""Prompt sets: order, fingerprint, overlap and batches."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.data.prompts import Prompt, PromptSet

TEXTS = st.lists(st.text(max_size=5), min_size=1, max_size=40)


def test_a_prompt_set_is_never_empty():
    with pytest.raises(ValueError, match="'behaviour' is empty"):
        PromptSet("behaviour", ())


def test_a_prompt_set_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PromptSet.of("a", "one").name = "b"


@given(TEXTS, st.integers(1, 50))
def test_batches_are_the_prompts_in_order_and_only_the_last_is_short(texts, size):
    prompts = PromptSet.of("a", *texts)
    batches = list(prompts.batches(size))
    assert [index for index, _ in batches] == list(range(len(batches)))
    assert tuple(prompt for _, batch in batches for prompt in batch) == prompts.prompts
    assert all(len(batch) == size for _, batch in batches[:-1])
    assert 1 <= len(batches[-1][1]) <= size


@given(TEXTS, TEXTS)
def test_two_sets_have_one_fingerprint_if_and_only_if_their_prompts_are_equal(one, other):
    a, b = PromptSet.of("a", *one), PromptSet.of("b", *other)
    assert (a.fingerprint == b.fingerprint) == (one == other)


def test_the_fingerprint_depends_on_system_prompts_and_order_and_not_on_names():
    plain = PromptSet.of("a", "one", "two")
    assert plain.fingerprint == PromptSet("b", plain.prompts, "elsewhere").fingerprint
    assert plain.fingerprint != PromptSet.of("a", "two", "one").fingerprint
    system = PromptSet("a", tuple(Prompt(p.user, "Be brief.") for p in plain.prompts))
    assert plain.fingerprint != system.fingerprint
    empty = PromptSet("a", tuple(Prompt(p.user, "") for p in plain.prompts))
    assert plain.fingerprint != empty.fingerprint


def test_the_fingerprint_stays_the_same_between_versions():
    prompts = PromptSet("a", (Prompt("Käse?"), Prompt("two", "Be brief.")))
    known = "aa163e51d7ae03104d8f480f4eae1123478e145130a5f85d72acf0d3ebaea9b1"
    assert prompts.fingerprint == known


def test_overlap_ignores_case_and_spacing():
    mine = PromptSet.of("a", "How  are\nyou?", "Straße", "other")
    theirs = PromptSet.of("b", " how are YOU? ", "STRASSE")
    assert [prompt.user for prompt in mine.overlap(theirs)] == ["How  are\nyou?", "Straße"]


@given(TEXTS, TEXTS)
def test_overlap_is_empty_from_both_sides_or_from_neither(one, other):
    a, b = PromptSet.of("a", *one), PromptSet.of("b", *other)
    assert bool(a.overlap(b)) == bool(b.overlap(a))
    assert a.overlap(a) == a.prompts
