"""`lm-eval`: tasks of EleutherAI's lm-evaluation-harness, with the model that is loaded here.

A chunk is a task, its items the task's first samples, so that two models are compared sample by
sample. The harness builds the prompts, asks the model and scores the answers; what it says of the
whole task is stored in the chunk's `rows`. Knows nothing about what the tasks are.
"""

import copy
import importlib.util
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy
import torch

from ray_abliterate.data.readers import existing_path
from ray_abliterate.errors import PromptSourceError, RecipeError, ScoreError
from ray_abliterate.evaluation.suites.aggregation import AggregatedSuite
from ray_abliterate.evaluation.suites.suite import Chunk, Measure, SuiteChunk, SuiteModel
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe.suites import LmEvalSuite

INSTALL = "pip install 'ray-abliterate[lm-eval]'"
SEED = 1234
"""Seed for the choice of examples: the harness's default."""


class LmEval(AggregatedSuite):
    """Measures tasks of lm-evaluation-harness, one task per chunk."""

    def __init__(self, settings: LmEvalSuite, base: Path = Path()) -> None:
        """
        Args:
            settings: The suite's section of the recipe.
            base: The recipe's folder.

        Raises:
            RecipeError: the harness is not installed.
        """
        self.name = settings.name
        self.settings, self.base = settings, base
        if importlib.util.find_spec("lm_eval") is None:
            raise RecipeError(
                f"suite {self.name!r}: lm-evaluation-harness is not installed.\n  {INSTALL}"
            )
        better: Literal["minimize", "maximize"]
        better = "minimize" if settings.lower_is_better else "maximize"
        self.measures = (Measure(settings.metric or "score", "mean", better),)

    def chunks(self) -> Iterator[Chunk]:
        """Yield a chunk for each task, whose items are samples by number.

        How many samples a task really has is only known when it is run.

        Raises:
            PromptSourceError: a task is unknown, or is a group of tasks.
        """
        index = self._index()
        for task in self.settings.tasks:
            _refuse_unknown_task(index, task, self.name)
        for task in self.settings.tasks:
            numbers = range(self.settings.limit)
            items = tuple({"id": f"{task}/{n}", "task": task, "sample": n} for n in numbers)
            yield Chunk(self.name, task, task, items)

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Return the task's metric sample by sample; None for samples that the task does not have.

        Raises:
            ScoreError: the model is not a `LanguageModel`, or the task has no such metric.
        """
        if not isinstance(model, LanguageModel):
            raise ScoreError(
                f"suite {self.name!r} needs a LanguageModel, not {type(model).__name__}"
            )
        task = str(chunk.items[0]["task"])
        results = self._evaluate(model, task)
        by_sample = _by_sample(results["samples"][task], self.settings.metric, self.name, task)
        values = [by_sample.get(item["sample"]) for item in chunk.items]
        row = {"task": task, "version": results["versions"].get(task), **results["results"][task]}
        row = {k: v for k, v in row.items() if isinstance(v, str | int | float)}
        return SuiteChunk.of(chunk, {self.measures[0].name: values}, rows=[row])

    def _evaluate(self, model: LanguageModel, task: str) -> dict[str, Any]:
        settings, index = self.settings, self._index()
        with _isolated():
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            # the harness changes the padding of its tokenizer, so it gets a copy
            adapter = HFLM(
                pretrained=model.module,
                tokenizer=copy.deepcopy(model.chat.tokenizer),
                backend="causal",
                batch_size=settings.batch_size,
            )
            results: dict[str, Any] | None = lm_eval.simple_evaluate(
                adapter,
                tasks=[task],
                num_fewshot=settings.shots,
                limit=settings.limit,
                bootstrap_iters=0,
                apply_chat_template=settings.chat,
                task_manager=index,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        if results is None:
            raise ScoreError(f"suite {self.name!r}: the harness gave no results for {task}")
        return results

    def _index(self) -> Any:
        folder = self.settings.folder
        return _tasks(str(existing_path(folder, self.base)) if folder else None)


@cache
def _tasks(folder: str | None) -> Any:
    """Return all tasks by name, read once per process: there are 14,000 files of them."""
    with _isolated():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=folder)


def _refuse_unknown_task(index: Any, task: str, suite: str) -> None:
    """Refuse anything but single tasks, whose samples are numbered."""
    if task in index.all_subtasks:
        return
    if task in index.all_tasks:
        raise PromptSourceError(
            f"suite {suite!r}: {task} is a group of tasks.\n"
            f"  Name single ones in `tasks`: lm-eval ls subtasks | grep {task}"
        )
    raise PromptSourceError(
        f"suite {suite!r}: the harness knows no task {task!r}.\n"
        "  Check `tasks` against `lm-eval ls subtasks`, or set `folder`."
    )


def _by_sample(
    samples: list[dict[str, Any]], metric: str, suite: str, task: str
) -> dict[int, float]:
    """Return the metric of each sample, by the sample's number; of the first filter."""
    known: list[str] = samples[0]["metrics"] if samples else []
    chosen = metric or next(iter(known), "")
    if chosen not in known:
        raise ScoreError(
            f"suite {suite!r}: {task} has no metric {chosen!r}.\n"
            f"  Set `metric` to one of: {', '.join(known)}."
        )
    values: dict[int, float] = {}
    for sample in samples:
        value = sample[chosen]
        if not isinstance(value, int | float):
            raise ScoreError(
                f"suite {suite!r}: {chosen} of {task} is one number for all samples, not one for "
                f"each.\n  Set `metric` to another of: {', '.join(known)}."
            )
        values.setdefault(int(sample["doc_id"]), float(value))
    return values


@contextmanager
def _isolated() -> Iterator[None]:
    """Undo, after the block, the seeds and the logging level that the harness sets."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
