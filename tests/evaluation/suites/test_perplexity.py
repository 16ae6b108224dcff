"""Losses of texts."""

import math
from pathlib import Path

import pytest
import torch

from ray_abliterate.errors import PromptSourceError
from ray_abliterate.evaluation.suites.build import run_chunk
from ray_abliterate.evaluation.suites.perplexity import Perplexity
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe.suites import PerplexitySuite
from tests.evaluation.suites.conftest import written

TEXTS = ["tell me about the stars", "the river", "stars", "how do i write about the soup"]


def suite(base: Path, **options: object) -> Perplexity:
    given = {"kind": "perplexity", "table": {"file": "t.jsonl"}, "least_characters": 1, **options}
    return Perplexity(PerplexitySuite.model_validate(given), base)


def test_losses_are_those_of_one_forward_pass(tmp_path: Path, model: LanguageModel) -> None:
    written(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    own = suite(tmp_path, chunk=3)
    results = [run_chunk(own, model, chunk) for chunk in own.chunks()]
    assert [len(result.items) for result in results] == [3, 1]
    found = [value for result in results for value in result.values["loss"]]
    nats, tokens = [], 0
    for text, value in zip(TEXTS, found, strict=True):
        ids = model.chat.tokenizer(text, return_tensors="pt")["input_ids"][0]
        if len(ids) < 2:
            assert value is None
            continue
        with torch.no_grad():
            logits = model.module(ids[None]).logits[0, :-1].double()
        losses = -logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        assert value == pytest.approx(float(losses.mean()), rel=1e-5)  # float32 against float64
        nats += losses.tolist()
        tokens += len(losses)
    (score,) = own.summary(results)
    assert score.detail["tokens"] == tokens
    assert score.detail["perplexity"] == pytest.approx(math.exp(math.fsum(nats) / tokens), rel=1e-5)
    assert score.detail["bits_per_byte"] > 0


def test_only_the_first_tokens_count(tmp_path: Path, model: LanguageModel) -> None:
    written(tmp_path / "t.jsonl", [{"text": TEXTS[0]}])
    (short,) = [run_chunk(suite(tmp_path, tokens=3), model, c) for c in suite(tmp_path).chunks()]
    assert short.counts["tokens"] == 2


def test_the_text_that_ships_is_there() -> None:
    (chunk,) = Perplexity(PerplexitySuite(kind="perplexity")).chunks()
    assert len(chunk.items) == 12 and "White Rabbit" in chunk.items[1]["text"]


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    written(tmp_path / "t.jsonl", [{"text": "the stars"}, {"text": 3}])
    with pytest.raises(PromptSourceError, match=r"line 2: `text` is 3, not a text"):
        list(suite(tmp_path).chunks())
    written(tmp_path / "t.jsonl", [{"text": "stars"}])
    with pytest.raises(PromptSourceError, match="no row has 64 characters"):
        list(suite(tmp_path, least_characters=64).chunks())
