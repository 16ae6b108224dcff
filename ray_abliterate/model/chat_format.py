"""From a prompt to token ids: chat templates, system prompts, no double BOS.

Knows tokenizers, and nothing about models.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.errors import ModelError
from ray_abliterate.recipe import ModelSettings

log = logging.getLogger(__name__)

CLOSED_THINKING = (
    ("<think>", "<think></think>"),
    ("<thought>", "<thought></thought>"),
    ("[THINK]", "[THINK][/THINK]"),
    (
        "<|channel|>analysis<|message|>",
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
    ),
)
"""How answers of thinking models begin, and the same with an empty thought: what follows is the
answer proper."""

SAMPLE_TEXT = "How do 1,234 colours — naïve, *bold* — fit?\n"
"""Its tokens tell tokenizers apart."""


class ChatFormat:
    """Turns prompts into token ids the way one model expects them."""

    def __init__(self, tokenizer: Any, settings: ModelSettings) -> None:
        """Read the template.

        Raises:
            ModelError: the tokenizer has no chat template, and the recipe doesn't say what to do.
        """
        self.tokenizer = tokenizer
        # text must only grow with its tokens, so that it can be followed while it is written
        self.tokenizer.clean_up_tokenization_spaces = False
        self.plain = settings.chat_template == "plain"
        self.merges_system = False
        self._options = (
            {}
            if settings.enable_thinking is None
            else {"enable_thinking": settings.enable_thinking}
        )
        self._template: str | None = None
        if settings.chat_template and not self.plain:
            try:
                self._template = Path(settings.chat_template).read_text(encoding="utf-8")
            except OSError as error:
                raise ModelError(
                    f"model.chat_template = {settings.chat_template!r} cannot be read "
                    f"({error.strerror}); give a Jinja file, or `plain`."
                ) from None
        elif not self.plain and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"{settings.name} has no chat template (base models don't).\n"
                '  Set model.chat_template = "plain" to use prompts as they are, or to a Jinja '
                "file,\n  or choose the model's instruct version."
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what makes tokens of prompts: template, its options, a sample of the tokens.

        The template's text, not what it writes, which may hold the date.
        """
        template = self._template or getattr(self.tokenizer, "chat_template", None)
        facts = ["plain" if self.plain else template, self._options, self.ids(SAMPLE_TEXT)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def text(self, prompt: Prompt) -> str:
        """The prompt as the model reads it, up to where its answer begins."""
        if self.plain:
            return f"{prompt.system}\n\n{prompt.user}" if prompt.system else prompt.user
        return self.conversation([{"role": "user", "content": prompt.user}], prompt.system)

    def conversation(self, turns: Sequence[dict[str, str]], system: str | None = None) -> str:
        """A whole conversation, up to where the next answer begins."""
        from jinja2.exceptions import TemplateError

        turns = list(turns)
        if self.plain:
            return "\n\n".join([*([system] if system else []), *(t["content"] for t in turns)])
        if system is not None and not self.merges_system:
            try:
                return self._render([{"role": "system", "content": system}, *turns])
            except TemplateError:
                self.merges_system = True
                log.warning("the chat template takes no system prompt; it goes before the user's")
        if system:
            first = turns[0]["content"]
            turns[0] = {"role": "user", "content": f"{system}\n\n{first}"}
        try:
            return self._render(turns)
        except TemplateError as error:
            raise ModelError(
                f"the chat template failed: {error}.\n"
                '  Set model.chat_template to a Jinja file that works, or to "plain".'
            ) from None

    def _render(self, turns: list[dict[str, str]]) -> str:
        rendered = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            **self._options,
        )
        return str(rendered)

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt.

        The template has written the special tokens already, so none are added; only plain prompts
        get the tokenizer's own. A beginning-of-sequence token is never doubled.
        """
        ids = list(self.tokenizer(text, add_special_tokens=self.plain)["input_ids"])
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if not ids:
            raise ModelError("a prompt has no tokens; leave empty prompts out of the prompt set")
        return ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        return self.ids(self.text(prompt))

    def opening(self, text: str) -> list[int]:
        """Token ids of a text as an answer begins with it: behind a blank if prompts are plain."""
        given = f" {text}" if self.plain and text[:1].strip() else text
        return list(self.tokenizer(given, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of new tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> "TextStream":
        """Reads one answer token by token."""
        return TextStream(self)


class TextStream:
    """The text of tokens that come one by one: pieces whose sum is the beginning of `decode`.

    A character that is split between tokens comes with its last one.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._tokens: list[int] = []
        self._given = ""
        self._fast: Any = getattr(chat.tokenizer, "_tokenizer", None)
        self._stream = None
        if self._fast is not None:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that a token adds."""
        if self._stream is not None:
            return self._stream.step(self._fast, token) or ""
        self._tokens.append(token)  # a tokenizer without streams: all again
        text = self._chat.decode(self._tokens).rstrip("\ufffd")
        added, self._given = text[len(self._given) :], text
        return added


def common_prefix(answers: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all answers begin with; nothing if that is all that some answer has.

    Fewer than two different answers have nothing in common that could be told from their content.
    """
    distinct = {tuple(answer) for answer in answers}
    if len(distinct) < 2:
        return ()
    shortest = min(distinct, key=len)
    length = 0
    while length < len(shortest) and len({answer[length] for answer in distinct}) == 1:
        length += 1
    return () if length == len(shortest) else shortest[:length]


def close_thinking(prefix: tuple[int, ...], chat: ChatFormat) -> tuple[int, ...]:
    """The prefix, with a thinking block that it opens closed at once."""
    text = str(chat.tokenizer.decode(list(prefix), skip_special_tokens=False))
    for opening, closed in CLOSED_THINKING:
        if text.lstrip().startswith(opening):
            return tuple(chat.tokenizer(closed, add_special_tokens=False)["input_ids"])
    return prefix
