"""A language model's residuals, logits and answers, compared with transformers' own."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from ray_abliterate.data.builtin.planted_model import PLANTED_LAYER, planted_axes
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.errors import ModelError
from ray_abliterate.model import prefix_cache
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.prefix_cache import common_length
from ray_abliterate.recipe import DirectionSettings, ModelSettings


@pytest.fixture(scope="module")
def model(planted: Path) -> LanguageModel:
    return LanguageModel.load(str(planted), ModelSettings(name="planted"), batch_size=3)


def test_the_planted_model_declines_flagged_prompts_and_answers_the_rest(
    model: LanguageModel, behaviour: PromptSet, neutral: PromptSet
) -> None:
    assert {a.text for a in model.answer(behaviour.prompts, 5)} == {"sorry"}
    assert {a.text for a in model.answer(neutral.prompts, 5)} == {"sure"}


def test_extraction_finds_the_planted_direction(
    model: LanguageModel, behaviour: PromptSet, neutral: PromptSet
) -> None:
    found = directions_from_residuals(
        Residuals(model.residuals(behaviour.prompts)),
        Residuals(model.residuals(neutral.prompts)),
        DirectionSettings(),
    )
    for layer in range(PLANTED_LAYER, found.layers):
        assert float(found.vectors[layer] @ planted_axes()[0]) > 0.999
    assert not any(found.usable[:PLANTED_LAYER])


def test_residuals_are_block_outputs_before_the_final_norm(
    model: LanguageModel, behaviour: PromptSet
) -> None:
    prompt = behaviour.prompts[:1]
    found = model.residuals(prompt)[0]
    ids = torch.tensor(model.encode(prompt))
    states = model.module(ids, output_hidden_states=True).hidden_states
    for layer in range(len(model.blocks) - 1):  # transformers' index 0 is the embedding
        torch.testing.assert_close(found[layer], states[layer + 1][0, -1], rtol=1e-5, atol=1e-6)
    normed = model.module.model.norm(found[-1])
    torch.testing.assert_close(normed, states[-1][0, -1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[-1], states[-1][0, -1])


@pytest.mark.parametrize("packed", [True, False])
def test_residuals_at_several_tokens_are_those_of_one_pass_counted_from_the_end(
    packed: bool, model: LanguageModel, behaviour: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(model, "_engine", None)
    layers = len(model.blocks)
    monkeypatch.setattr(model, "response_prefix", tuple(model.tokens("the soup")))
    found = model.residuals(behaviour.prompts, 3)
    assert found.shape[1] == 3 * layers
    assert torch.equal(found[:, :layers], model.residuals(behaviour.prompts))
    for index, row in enumerate(model.encode(behaviour.prompts)):
        states = model.module(torch.tensor([row]), output_hidden_states=True).hidden_states
        for back in range(3):
            for layer in range(layers - 1):
                own, direct = found[index, back * layers + layer], states[layer + 1][0, -1 - back]
                torch.testing.assert_close(own, direct, rtol=1e-4, atol=1e-5)


def test_positions_where_prompts_have_words_of_their_own_are_refused(
    model: LanguageModel, behaviour: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelError, match=r"(?s)positions = 2, but.*end with 1 tokens.*to 1 or less"
    ):
        model.residuals(behaviour.prompts, 2)
    monkeypatch.setattr(model, "response_prefix", tuple(model.tokens("the soup")))
    with pytest.raises(ModelError, match=r"positions = 4, but.*end with 3 tokens"):
        model.residuals(behaviour.prompts, 4)
    alone = PromptSet.of("short", "why").prompts
    tokens = len(model.encode(alone)[0])
    with pytest.raises(ModelError, match=rf"end with {tokens} tokens"):
        model.residuals(alone, tokens + 1)


def test_a_padded_batch_equals_each_prompt_alone(
    model: LanguageModel, behaviour: PromptSet, neutral: PromptSet
) -> None:
    prompts = [*behaviour.prompts, *neutral.prompts]
    residuals, logits = model.residuals(prompts), model.next_token_logits(prompts)
    texts = [answer.text for answer in model.answer(prompts, 4)]
    for index, prompt in enumerate(prompts):
        alone = model.residuals([prompt])[0]
        torch.testing.assert_close(residuals[index], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[index], model.next_token_logits([prompt])[0])
        assert texts[index] == model.answer([prompt], 4)[0].text


def test_answers_are_transformers_own_greedy_tokens(
    model: LanguageModel, behaviour: PromptSet
) -> None:
    for prompt in behaviour.prompts:
        ids = torch.tensor(model.encode([prompt]))
        output = model.module.generate(ids, max_new_tokens=4, do_sample=False)
        expected = output[0, ids.shape[1] :].tolist()
        assert model.continue_greedily([prompt], 4)[0] == expected


class Until:
    """Ends an answer that holds a text."""

    def __init__(self, text: str) -> None:
        self.text, self.seen = text, defaultdict[int, str](str)

    def begin(self, index: int) -> None:
        self.seen[index] = ""

    def read(self, index: int, text: str) -> bool:
        self.seen[index] += text
        return self.text in self.seen[index]

    def enough(self) -> bool:
        return False


def test_answers_end_when_they_are_decided_and_not_before(
    model: LanguageModel, behaviour: PromptSet
) -> None:
    answers = model.answer(behaviour.prompts, 8, Until("sorry"))
    assert [(a.text, a.tokens, a.stopped) for a in answers] == [("sorry", 1, True)] * len(answers)
    undecided = model.answer(behaviour.prompts, 8, Until("never"))
    assert [(a.text, a.tokens, a.stopped) for a in undecided] == [("sorry", 2, False)] * len(
        answers
    )


def test_teacher_forced_logits_at_the_first_token_are_the_next_token_logits(
    model: LanguageModel, neutral: PromptSet
) -> None:
    continuations = model.continue_greedily(neutral.prompts, 3)
    forced = model.continuation_logits(neutral.prompts, continuations)
    first = model.next_token_logits(neutral.prompts)
    assert [len(rows) for rows in forced] == [len(tokens) for tokens in continuations]
    for rows, row, tokens in zip(forced, first, continuations, strict=True):
        torch.testing.assert_close(rows[0], row, rtol=1e-4, atol=1e-5)
        assert rows.argmax(-1).tolist() == tokens


def test_a_response_prefix_goes_after_every_prompt(model: LanguageModel) -> None:
    prompt = Prompt("why")
    bare = model.encode([prompt])[0]
    model.response_prefix = (5, 6)
    try:
        assert model.encode([prompt])[0] == [*bare, 5, 6]
    finally:
        model.response_prefix = ()


def test_a_missing_model_says_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config"):
        LanguageModel.load(str(tmp_path), ModelSettings(name=str(tmp_path)))
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="there is no such folder"):
        LanguageModel.load(missing, ModelSettings(name=missing))


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "zephyr_moe"}')
    with pytest.raises(ModelError, match="does not know its model type"):
        LanguageModel.load(str(tmp_path), ModelSettings(name="m"))


@pytest.mark.parametrize("family", ["llama", "mamba", "falcon_mamba", "recurrent_gemma", "bloom"])
def test_logits_of_a_padded_batch_are_right_for_every_kind_of_family(
    family: str, planted: Path
) -> None:
    """Where padding leaks into recurrent state, batches hold prompts of one length."""
    from transformers import AutoTokenizer

    from ray_abliterate.testing.tiny import tiny_model

    module = tiny_model(family)
    tokenizer = AutoTokenizer.from_pretrained(planted)
    limit = module.get_input_embeddings().weight.shape[0]
    model = LanguageModel(module, tokenizer, ModelSettings(name="m"), batch_size=8)
    rows = [[(5 * i + n) % limit for i in range(n)] for n in (3, 9, 5, 9, 4)]
    model.encode = lambda prompts: [rows[int(p.user)] for p in prompts]  # type: ignore[method-assign]
    prompts = [Prompt(str(i)) for i in range(len(rows))]
    together = model.next_token_logits(prompts)
    for index, prompt in enumerate(prompts):
        alone = model.next_token_logits([prompt])[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 9]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # something of every row is left over
        ([[1, 2], [1, 2, 3], [1, 2, 4]], 1),
        ([[1, 2, 3]], 0),
        ([[5], [6]], 0),
        ([[2, 3, 4], [1, 3, 4], [2, 3, 5]], 0),
    ],
)
def test_what_rows_share_is_what_all_begin_with(rows: list[list[int]], expected: int) -> None:
    assert common_length(rows) == expected


def test_a_shared_beginning_is_computed_once_and_changes_nothing(
    model: LanguageModel, behaviour: PromptSet, neutral: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are equal; numbers to float32 rounding (sums over keys are split differently)."""
    system = "you can sing a song about the road and the rain to me in the car"
    prompts = [Prompt(p.user, system) for p in [*behaviour.prompts, *neutral.prompts]]
    assert model.padded.shares_prefix
    monkeypatch.setattr(model, "_engine", None)

    def everything() -> tuple[object, ...]:
        return (
            model.residuals(prompts),
            model.next_token_logits(prompts),
            model.continuation_logits(prompts, [[6, 7, 2]] * len(prompts)),
            [(a.text, a.tokens) for a in model.answer(prompts, 4)],
        )

    lengths = []
    real = prefix_cache.compute_prefix
    monkeypatch.setattr(
        prefix_cache,
        "compute_prefix",
        lambda m, tokens: lengths.append(len(tokens)) or real(m, tokens),
    )
    shared = everything()
    assert len(lengths) == 4 and min(lengths) > len(system.split())
    monkeypatch.setattr(model.padded, "shares_prefix", False)
    alone = everything()
    assert len(lengths) == 4
    torch.testing.assert_close(shared[:3], alone[:3], rtol=1e-4, atol=1e-5)
    assert shared[3] == alone[3]
