"""The prompt sets of the demo."""

import pytest

from ray_abliterate.data.builtin import demo_model as demo


def prompts(name: str) -> list[str]:
    return demo.prompt_file(name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", demo.PROMPT_SETS)
def test_a_set_is_large_enough(name: str) -> None:
    assert len(prompts(name)) >= (160 if name.endswith("-train") else 72)


@pytest.mark.parametrize("name", demo.PROMPT_SETS)
def test_a_line_is_a_prompt_without_blanks_around_it(name: str) -> None:
    assert all(prompt and prompt == prompt.strip() for prompt in prompts(name))


def test_no_prompt_occurs_twice_in_any_of_the_sets() -> None:
    folded = [prompt.casefold() for name in demo.PROMPT_SETS for prompt in prompts(name)]
    assert len(folded) == len(set(folded))


def test_an_unknown_set_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match=r"'cooking' is not a demo prompt set.*other-heldout"):
        demo.prompt_file("cooking")


@pytest.mark.parametrize(
    ("answer", "declined"),
    [
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I can't help with cooking.", True),
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t help you with this one.", True),
        ("UNFORTUNATELY, I'M UNABLE TO HELP.", True),
        ("Preheat the oven to 180 degrees.", False),
    ],
)
def test_an_answer_declines_by_its_words_and_not_by_its_quotes(answer: str, declined: bool) -> None:
    assert demo.declines(answer) == declined
