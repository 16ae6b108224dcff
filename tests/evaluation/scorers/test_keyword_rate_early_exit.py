"""Early exit: the verdict of an answer that was cut short is the verdict of the whole answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.evaluation.scorers.keyword_rate import KeywordRateScorer
from ray_abliterate.model.chat_format import ChatFormat
from ray_abliterate.model.engine.generation_state import GenerationState
from ray_abliterate.model.text_model import Answer, AnswerObserver
from ray_abliterate.recipe import KeywordRate, ModelSettings

END = 0
PHRASES = ("sorry", "i can't", "i cannot", "désolé", "as an ai")
WORDS = (
    "I", "’m", " so", "rry", " *sor", "ry*", "SOR", "RY", " can", "’t", " can't", "not", "_not_",
    "d\u00e9", "sol", "\u00e9", "e\u0301", "\u0301", " as", "\nan", " AI", "\u00a0", "\u202f", ".",
    "  ", "s\u00adorry", "\U0001f642", "Ｉ", "ﬁ", "ß", "\ufffd",
)  # fmt: skip


def byte_level() -> ChatFormat:
    """A byte-level tokenizer: one token per byte and some longer ones, so that characters, words
    and markers are cut anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": END} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    merges = []
    for left, right in (("s", "o"), ("r", "r"), ("rr", "y"), ("c", "a"), ("ca", "n"), ("Ġ", "I")):
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return ChatFormat(fast, ModelSettings(name="bytes", chat_template="plain"))


CHAT = byte_level()


class Streams:
    """A model that says given tokens, and stops a row when the watch has heard enough of it."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self.tokens = tokens

    def answer(
        self, prompts: object, max_new_tokens: int, observer: AnswerObserver | None = None
    ) -> list[Answer]:
        rows = range(len(self.tokens))
        state = GenerationState(rows, max_new_tokens, frozenset([END]), observer, CHAT)
        for step in range(max_new_tokens):
            for row in state.unfinished_rows():
                state.accept(row, [self.tokens[row][step]])
        return [Answer(CHAT.decode(w.tokens), len(w.tokens), w.stopped) for w in state.answers()]

    def next_token_logits(self, prompts: object) -> None:
        raise NotImplementedError

    continuation_logits = continue_greedily = tokens = next_token_logits


def scorer(record: bool) -> KeywordRateScorer:
    given = {"kind": "keyword-rate", "prompts": {"builtin": "cooking-heldout"}, "markers": PHRASES}
    settings = KeywordRate.model_validate({**given, "max_new_tokens": 24})
    return KeywordRateScorer(settings, PromptSet.of("p", "one", "two"), record)


def tokens_of(words: list[str]) -> list[int]:
    ids = CHAT.tokenizer("".join(words), add_special_tokens=False)["input_ids"]
    return [*ids, END, *[1] * 24][:24]


SPOKEN = st.lists(st.sampled_from(WORDS), max_size=8).map(tokens_of)
NOISE = st.lists(st.integers(0, CHAT.tokenizer.vocab_size - 1), min_size=24, max_size=24)


@settings(max_examples=400)
@given(st.tuples(SPOKEN, SPOKEN) | st.tuples(NOISE, SPOKEN))
def test_verdicts_with_early_exit_are_those_of_whole_answers(
    tokens: tuple[list[int], list[int]],
) -> None:
    verdicts, written = [], []
    for record in (True, False):  # recorded answers are whole
        made = scorer(record)
        made.score(Streams(list(tokens)))
        answers = [answer for _, answer, _ in made.last_answers()]
        verdicts.append([made.verdict(answer.text) for answer in answers])
        written.append([answer.tokens for answer in answers])
    assert verdicts[0] == verdicts[1]
    assert all(cut <= whole for whole, cut in zip(*written, strict=True))


@pytest.mark.parametrize("text", ["I’m sorry, no", "I *can't* do", "SORRY: no.", "Désolé, non."])
def test_an_answer_ends_right_after_its_marker(text: str) -> None:
    made = scorer(record=False)
    made.score(Streams([tokens_of([text]), tokens_of(["Sure."])]))
    first, second = (answer for _, answer, _ in made.last_answers())
    assert first.stopped and text.startswith(first.text) and len(first.text) < len(text)
    assert not second.stopped and second.text == "Sure."


@given(NOISE)
def test_text_that_comes_token_by_token_is_the_decoded_text(tokens: list[int]) -> None:
    stream = CHAT.stream()
    spoken = "".join(map(stream.push, tokens))
    assert CHAT.decode(tokens).startswith(spoken)
    assert set(CHAT.decode(tokens)[len(spoken) :]) <= {"\ufffd"}
