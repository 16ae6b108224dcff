"""A judge that is a classifier: labels, entailment, identity."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from ray_abliterate.errors import ModelError
from ray_abliterate.evaluation.judges.classifier import ClassifierJudge
from tests.support.classifiers import tiny_classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Tiny classifiers by their labels."""

    def make(*labels: str, kind: str | None = None) -> str:
        return tiny_classifier(tmp_path_factory.mktemp("classifier"), *labels, kind=kind)

    return make


EXCHANGES = [
    ("yes", "I cannot help"), ("no", "Sure here it is the answer"), ("yes", "Sorry"),
    ("no", ""), ("yes", "no " * 90),
]  # fmt: skip


def logits_of(folder: str, text: str, pair: str | None = None) -> torch.Tensor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(text, pair, return_tensors="pt", truncation=True, max_length=38)
    return model(**inputs).logits[0].detach()


def test_a_classifier_gives_its_labels_probability_and_no_judgement_of_nothing(made) -> None:
    folder = made("answer", "Refusal", "other")
    found = ClassifierJudge(folder, label="refusal").judge(EXCHANGES)
    assert found[3] is None
    for place in (0, 1, 2, 4):
        expected = logits_of(folder, EXCHANGES[place][1]).softmax(-1)[1].item()
        assert found[place] == pytest.approx(expected, abs=1e-5)


def test_labels_that_do_not_exclude_each_other_have_a_probability_each(made) -> None:
    folder = made("toxic", "refusal", kind="multi_label_classification")
    (found,) = ClassifierJudge(folder, label="refusal").judge(EXCHANGES[:1])
    assert found == pytest.approx(logits_of(folder, EXCHANGES[0][1])[1].sigmoid().item(), abs=1e-5)


def test_entailment_of_a_hypothesis_is_zero_shot(made) -> None:
    folder = made("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    (found,) = ClassifierJudge(folder, hypothesis="no help").judge(EXCHANGES[:1])
    logits = logits_of(folder, EXCHANGES[0][1], "no help")
    assert found == pytest.approx(logits[[2, 0]].softmax(0)[0].item(), abs=1e-5)


def test_a_classifier_sees_the_prompt_if_it_should(made) -> None:
    folder = made("answer", "refusal")
    (found,) = ClassifierJudge(folder, label="refusal", sees_prompt=True).judge(EXCHANGES[:1])
    expected = logits_of(folder, "yes I cannot help").softmax(-1)[1].item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_label_or_hypothesis_that_the_classifier_does_not_know_is_told_with_those_it_has(
    made, tmp_path: Path
) -> None:
    folder = made("answer", "refusal")
    with pytest.raises(ModelError, match="one of: answer, refusal"):
        ClassifierJudge(folder, label="refuses").judge(EXCHANGES)
    with pytest.raises(ModelError, match="none for entailment and contradiction"):
        ClassifierJudge(folder, hypothesis="no help").judge(EXCHANGES)
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClassifierJudge(str(tmp_path), label="refusal").judge(EXCHANGES)


def test_a_classifier_is_known_by_its_weights_and_travels_without_them(made) -> None:
    judge = ClassifierJudge(made("answer", "refusal"), label="refusal")
    other = ClassifierJudge(made("refusal", "answer"), label="refusal")
    assert judge.identity != other.identity
    assert judge.identity != ClassifierJudge(judge._name, label="answer").identity
    copy = pickle.loads(pickle.dumps(judge))
    assert copy._loaded is None
    assert copy.identity == judge.identity
