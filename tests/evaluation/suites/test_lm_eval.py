"""Tasks of lm-evaluation-harness, on a task and data of our own; nothing is downloaded."""

import importlib.util
import json
from pathlib import Path

import numpy
import pytest
import torch

from ray_abliterate.errors import PromptSourceError, RecipeError, ScoreError
from ray_abliterate.evaluation.suites.build import run_chunk
from ray_abliterate.evaluation.suites.lm_eval import LmEval
from ray_abliterate.evaluation.suites.suite import Suite
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe.suites import LmEvalSuite
from ray_abliterate.testing.suites import SuiteContract

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HARNESS, reason="lm-eval is not installed: pip install 'ray-abliterate[lm-eval]'"
)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "what is the {{{{word}}}}"
doc_to_choice: ["soup", "bread", "bake"]
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: brier_score
"""
ROWS = [{"word": word, "answer": n % 3} for n, word in enumerate("a b c d e f".split())]


def task(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    text = TASK.format(name=name, data=data)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("harness")
    task(base / "tasks", "tiny_first")
    task(base / "tasks", "tiny_second")
    group = {"group": "tiny", "task": ["tiny_first", "tiny_second"]}
    (base / "tasks" / "tiny.yaml").write_text(json.dumps(group), encoding="utf-8")
    return base


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets are made here, and kept here."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def suite(base: Path, **options: object) -> LmEval:
    given = {"tasks": ["tiny_first", "tiny_second"], "folder": "tasks", "limit": 4, **options}
    return LmEval(LmEvalSuite.model_validate({"kind": "lm-eval", **given}), base)


@needs_harness
class TestLmEval(SuiteContract):
    @pytest.fixture
    def suite(self, base: Path) -> Suite:
        return suite(base)


@needs_harness
def test_a_chunk_is_a_task_and_its_values_are_those_of_its_samples(
    base: Path, model: LanguageModel
) -> None:
    own = suite(base, limit=9)
    drawn = torch.get_rng_state(), numpy.random.get_state()[1]
    chunk = next(iter(own.chunks()))
    found = run_chunk(own, model, chunk)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (numpy.random.get_state()[1] == drawn[1]).all()
    assert (chunk.id, chunk.group, len(chunk.items)) == ("tiny_first", "tiny_first", 9)
    assert found.values["score"][6:] == (None, None, None)
    known = found.values["score"][:6]
    right = [likeliest(model, f"what is the {row['word']}") == row["answer"] for row in ROWS]
    assert list(known) == right
    assert 0 < sum(known) < 6
    (main, *_) = own.summary([found])
    assert (main.name, main.goal, main.value) == ("lm-eval", "maximize", sum(known) / 6)
    assert main.detail["unknown"] == 3
    assert found.rows[0]["acc,none"] == pytest.approx(sum(known) / 6)


def likeliest(model: LanguageModel, prompt: str) -> int:
    """By one plain forward pass for each choice."""
    tokenizer, scores = model.chat.tokenizer, []
    for choice in ("soup", "bread", "bake"):
        start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False, return_tensors="pt")
        logits = model.module(input_ids=ids["input_ids"][:, :-1]).logits[0].log_softmax(-1)
        own = ids["input_ids"][0, start.shape[1] :]
        scores.append(sum(float(logits[start.shape[1] - 1 + i, t]) for i, t in enumerate(own)))
    return scores.index(max(scores))


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (["tiny"], r"'lm-eval': tiny is a group of tasks\.\n  Name single ones in `tasks`"),
        (["no_such_task"], r"the harness knows no task 'no_such_task'\.\n  Check `tasks`"),
    ],
)
def test_tasks_that_cannot_be_are_refused_before_a_model_is_asked(
    base: Path, tasks: list[str], says: str
) -> None:
    with pytest.raises(PromptSourceError, match=says):
        next(iter(suite(base, tasks=tasks).chunks()))


@needs_harness
@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("f2", r"tiny_first has no metric 'f2'\.\n  Set `metric` to one of: acc, brier_score"),
        ("brier_score", r"brier_score of tiny_first is one number for all samples"),
    ],
)
def test_metrics_that_cannot_be_are_refused(
    base: Path, model: LanguageModel, metric: str, says: str
) -> None:
    own = suite(base, metric=metric)
    with pytest.raises(ScoreError, match=says):
        run_chunk(own, model, next(iter(own.chunks())))


def test_without_the_harness_the_error_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"is not installed\.\n  pip install 'ray-abliterate\[lm"):
        suite(tmp_path)
