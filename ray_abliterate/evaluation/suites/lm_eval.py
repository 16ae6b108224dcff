"""`lm-eval`: tasks of EleutherAI's lm-evaluation-harness, with the model that is loaded here.

A chunk is a task, its items the task's first samples, so that two models are compared sample by
sample. The harness builds the prompts, asks the model and scores the answers; what it prints of the
whole task is kept in the chunk's `rows`. Knows nothing of what the tasks are.
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
"""Of the choice of examples; the harness's own."""


class LmEval(AggregatedSuite):
    """See the module."""

    def __init__(self, settings: LmEvalSuite, base: Path = Path()) -> None:
        """
        Args:
            settings: As the recipe has them.
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
        """A chunk is a task, its items samples by number; how many it has is known when it is run.

        Raises:
            PromptSourceError: a task is not known, or is a group of tasks.
        """
        index = self._index()
        for task in self.settings.tasks:
            _refuse(index, task, self.name)
        for task in self.settings.tasks:
            numbers = range(self.settings.limit)
            items = tuple({"id": f"{task}/{n}", "task": task, "sample": n} for n in numbers)
            yield Chunk(self.name, task, task, items)

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """The task's metric, sample by sample; None for samples that the task does not have."""
        if not isinstance(model, LanguageModel):
            raise ScoreError(f"suite {self.name!r} needs a model that is loaded here")
        task = str(chunk.items[0]["task"])
        found = self._evaluated(model, task)
        values = _by_sample(found["samples"][task], self.settings.metric, self.name, task)
        known = [values.get(item["sample"]) for item in chunk.items]
        row = {"task": task, "version": found["versions"].get(task), **found["results"][task]}
        kept = {k: v for k, v in row.items() if isinstance(v, str | int | float)}
        return SuiteChunk.of(chunk, {self.measures[0].name: known}, rows=[kept])

    def _evaluated(self, model: LanguageModel, task: str) -> dict[str, Any]:
        settings, index = self.settings, self._index()
        with _as_it_was():
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            # a tokenizer of its own: the harness sets its padding
            asked = HFLM(
                pretrained=model.module,
                tokenizer=copy.deepcopy(model.chat.tokenizer),
                backend="causal",
                batch_size=settings.batch_size,
            )
            found: dict[str, Any] | None = lm_eval.simple_evaluate(
                asked,
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
        if found is None:
            raise ScoreError(f"suite {self.name!r}: the harness gave no results of {task}")
        return found

    def _index(self) -> Any:
        own = self.settings.folder
        return _tasks(str(existing_path(own, self.base)) if own else None)


@cache
def _tasks(folder: str | None) -> Any:
    """All tasks by name; reading their 14,000 files takes a while, so once in a process."""
    with _as_it_was():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=folder)


def _refuse(index: Any, task: str, suite: str) -> None:
    """Only single tasks: their samples have numbers of their own."""
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
    """One number for each sample, by its own number; of the first filter."""
    known: list[str] = samples[0]["metrics"] if samples else []
    chosen = metric or next(iter(known), "")
    if chosen not in known:
        raise ScoreError(
            f"suite {suite!r}: {task} has no metric {chosen!r}.\n"
            f"  Set `metric` to one of: {', '.join(known)}."
        )
    found: dict[int, float] = {}
    for sample in samples:
        value = sample[chosen]
        if not isinstance(value, int | float):
            raise ScoreError(
                f"suite {suite!r}: {chosen} of {task} is no number of a single sample, but of all "
                f"together.\n  Set `metric` to another of: {', '.join(known)}."
            )
        found.setdefault(int(sample["doc_id"]), float(value))
    return found


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Seeds that the harness sets, and what it says on the way, end with this block."""
    before, numbers = random.getstate(), numpy.random.get_state()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logger.setLevel(level)
        random.setstate(before)
        numpy.random.set_state(numbers)
