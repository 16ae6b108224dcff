"""The way from a prompt to token ids: chat templates, system prompts, no double BOS.

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
"""How answers of thinking models begin, and the same with an empty thought, after which the answer
proper begins."""

SAMPLE_TEXT = "How do 1,234 colours — naïve, *bold* — fit?\n"
"""A text whose tokens tell tokenizers apart."""


class ChatFormat:
    """Turns prompts into token ids the way one model expects them.

    Attributes:
        tokenizer: The model's tokenizer.
        plain: Whether prompts are used as they are, without a template.
        merges_system: Whether the template refuses system prompts, so that they go before the
            user's; known once one was refused.
    """

    def __init__(self, tokenizer: Any, settings: ModelSettings) -> None:
        """Read the template.

        Args:
            tokenizer: The model's tokenizer.
            settings: The recipe's: a template of its own, or none, and the thinking mode.

        Raises:
            ModelError: the tokenizer has no chat template and the recipe gives none, or its file
                can't be read.
        """
        self.tokenizer = tokenizer
        # text must only grow with its tokens, so that it can be read while it is written
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
        """The SHA-256 of the template, its options, and a sample of the tokenizer's tokens.

        It is of the template's text, not of its output, which may hold the date.
        """
        template = self._template or getattr(self.tokenizer, "chat_template", None)
        facts = ["plain" if self.plain else template, self._options, self.ids(SAMPLE_TEXT)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def text(self, prompt: Prompt) -> str:
        """Return a prompt as the model reads it, up to where its answer begins."""
        if self.plain:
            return f"{prompt.system}\n\n{prompt.user}" if prompt.system else prompt.user
        return self.conversation([{"role": "user", "content": prompt.user}], prompt.system)

    def conversation(self, turns: Sequence[dict[str, str]], system: str | None = None) -> str:
        """Return a whole conversation as the model reads it, up to where its next answer begins.

        Args:
            turns: `role` and `content` of each turn.
            system: A system prompt; where the template takes none, it goes before the first turn.

        Raises:
            ModelError: the template fails.
        """
        from jinja2.exceptions import TemplateError

        turns = list(turns)
        if self.plain:
            return "\n\n".join([*([system] if system else []), *(t["content"] for t in turns)])
        if system is not None and not self.merges_system:
            try:
                return self._render([{"role": "system", "content": system}, *turns])
            except TemplateError:
                self.merges_system = True
                log.warning(
                    "the chat template takes no system prompt; it is put before the user's prompt"
                )
        if system:
            first = turns[0]["content"]
            turns[0] = {"role": "user", "content": f"{system}\n\n{first}"}
        try:
            return self._render(turns)
        except TemplateError as error:
            raise ModelError(
                f"the chat template fails: {error}.\n"
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
        """Return the token ids of a rendered prompt.

        The template has written the special tokens already, so none are added; only plain prompts
        get the tokenizer's own. A beginning-of-sequence token is never doubled.

        Raises:
            ModelError: the prompt has no tokens.
        """
        ids = list(self.tokenizer(text, add_special_tokens=self.plain)["input_ids"])
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if not ids:
            raise ModelError("a prompt has no tokens.\n  Remove empty prompts from the prompt set.")
        return ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, template and special tokens included."""
        return self.ids(self.text(prompt))

    def opening(self, text: str) -> list[int]:
        """Return the token ids of a text as an answer begins with it.

        If prompts are plain, a blank separates the answer from its prompt.
        """
        separated = f" {text}" if self.plain and text[:1].strip() else text
        return list(self.tokenizer(separated, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of new tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> "TextStream":
        """Return what turns one answer into text token by token."""
        return TextStream(self)


class TextStream:
    """Turns tokens that come one by one into pieces of text.

    Together they are a beginning of `ChatFormat.decode`.

    A character that is split between tokens comes with the last of them.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._tokens: list[int] = []
        self._returned = ""
        self._fast: Any = getattr(chat.tokenizer, "_tokenizer", None)
        self._stream = None
        if self._fast is not None:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Return the text that a token adds."""
        if self._stream is not None:
            return self._stream.step(self._fast, token) or ""
        self._tokens.append(token)  # a slow tokenizer has no stream, so everything is decoded again
        text = self._chat.decode(self._tokens).rstrip("\ufffd")
        added, self._returned = text[len(self._returned) :], text
        return added


def common_prefix(answers: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the tokens that all answers begin with; none if some answer has no others.

    Nor if there are fewer than two different answers: what they have in common may be their
    content.
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
    """Return a response prefix that closes the thinking block that `prefix` opens, if it opens one.

    Args:
        prefix: The tokens that all answers begin with.
        chat: Turns tokens into text and back.
    """
    text = str(chat.tokenizer.decode(list(prefix), skip_special_tokens=False))
    for opening, closed in CLOSED_THINKING:
        if text.lstrip().startswith(opening):
            return tuple(chat.tokenizer(closed, add_special_tokens=False)["input_ids"])
    return prefix
