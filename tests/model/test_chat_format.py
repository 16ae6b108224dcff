"""Chat formats: templates, system prompts, beginning tokens, response prefixes."""

from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.errors import ModelError
from ray_abliterate.model.chat_format import ChatFormat, close_thinking, common_prefix
from ray_abliterate.recipe import ModelSettings


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], (1, 2)),
        ([[1, 2], [1, 2, 3]], ()),  # all of an answer is not a prefix
        ([[1, 2, 3], [1, 2, 3]], ()),  # one answer, given twice
        ([[1, 2, 3]], ()),
        ([[1], [2]], ()),
    ],
)
def test_the_common_prefix_is_what_answers_share_before_they_differ(
    answers: list[list[int]], expected: tuple[int, ...]
) -> None:
    assert common_prefix(answers) == expected


class Characters:
    """A tokenizer of single characters, with a template of a test's choice."""

    bos_token_id: int | None = 1
    eos_token_id, pad_token_id = 2, None

    def __init__(self, template: str | None) -> None:
        from jinja2 import Environment

        self.chat_template = template
        self._environment = Environment()

        def refuse(message: str) -> None:
            from jinja2.exceptions import TemplateError

            raise TemplateError(message)

        self._environment.globals["raise_exception"] = refuse

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, chat_template: str | None, **options: object
    ) -> str:
        template = chat_template or self.chat_template or ""
        return self._environment.from_string(template).render(messages=turns, **options)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [1 if character == "^" else ord(character) for character in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in ids)


PLAIN_TEMPLATE = "^{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + PLAIN_TEMPLATE
)


def test_a_beginning_token_is_never_doubled() -> None:
    for template in (PLAIN_TEMPLATE, "^" + PLAIN_TEMPLATE):
        chat = ChatFormat(Characters(template), ModelSettings(name="m"))
        assert chat.encode(Prompt("hi")).count(1) == 1
    plain = ChatFormat(Characters(None), ModelSettings(name="m", chat_template="plain"))
    assert plain.encode(Prompt("^hi")).count(1) == 1


def test_a_template_that_refuses_system_prompts_gets_them_before_the_users() -> None:
    chat = ChatFormat(Characters(NO_SYSTEM), ModelSettings(name="m"))
    assert chat.text(Prompt("hi", system="be brief")) == "^[user:be brief\n\nhi]"
    assert chat.text(Prompt("hi")) == "^[user:hi]"


def test_a_model_without_a_template_says_what_to_set() -> None:
    with pytest.raises(ModelError, match=r'model\.chat_template = "plain"'):
        ChatFormat(Characters(None), ModelSettings(name="m"))
    plain = ChatFormat(Characters(None), ModelSettings(name="m", chat_template="plain"))
    assert plain.text(Prompt("hi", system="s")) == "s\n\nhi"


def test_a_template_file_that_is_missing_is_named() -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        ChatFormat(Characters(None), ModelSettings(name="m", chat_template="/no/such.jinja"))


def test_a_chat_formats_fingerprint_is_of_template_options_and_tokens(tmp_path: Path) -> None:
    class Shifted(Characters):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            ids = super().__call__(text, add_special_tokens)["input_ids"]
            return {"input_ids": [i + 1 for i in ids]}

    (tmp_path / "own.jinja").write_text(NO_SYSTEM)
    own = {"chat_template": str(tmp_path / "own.jinja")}

    def fingerprint(tokenizer: Characters, **settings: Any) -> str:
        return ChatFormat(tokenizer, ModelSettings(name="m", **settings)).fingerprint

    fingerprints = [
        fingerprint(Characters(PLAIN_TEMPLATE)),
        fingerprint(Characters(NO_SYSTEM)),
        fingerprint(Shifted(PLAIN_TEMPLATE)),
        fingerprint(Characters(PLAIN_TEMPLATE), enable_thinking=False),
        fingerprint(Characters(PLAIN_TEMPLATE), chat_template="plain"),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint(Characters(PLAIN_TEMPLATE), **own) == fingerprints[1]


def test_an_opened_thinking_block_is_closed_at_once() -> None:
    chat = ChatFormat(Characters(PLAIN_TEMPLATE), ModelSettings(name="m"))
    opened = tuple(ord(c) for c in "<think>\nOkay, the user")
    assert chat.decode(close_thinking(opened, chat)) == "<think></think>"
    other = tuple(ord(c) for c in "Sure")
    assert close_thinking(other, chat) == other
