"""Scores a written model as the search scored the trial, and compares the two.

A search on quantized weights scored another model than the one that is written. So its plan is
first applied to the full-precision originals in memory: the files must score what that scores.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.evaluation.scorers.build import build_scorers
from ray_abliterate.evaluation.scorers.scorer import Scorer
from ray_abliterate.model.architecture import WriterRow, find_writers
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.loading import load_model, where_weights_rest
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.score import Score

EXACT = (1e-6, 1e-9)
"""Relative and absolute difference of a score that is rounding alone."""
CLOSE = (0.1, 1e-3)
"""The same where weights or arithmetic are not those of the search."""
CLOSE_ANSWERS = 3
"""Answers whose verdict may differ in that case."""
HOOKED = "weights that rest in {} were edited by hooks, which round outputs once more"


@dataclass(frozen=True)
class VerifiedScore:
    """One score of the written files, compared with the trial's.

    Attributes:
        name: The score's name.
        trial: Its value in the trial; after a search on quantized weights, the value that the
            trial's plan has on the originals in memory.
        reloaded: Its value for the written files.
        allowed: The most that the two may differ.
        within: Whether they differ by no more than that.
        quantized: Its value in the trial, after a search on quantized weights.
    """

    name: str
    trial: float
    reloaded: float
    allowed: float
    within: bool
    quantized: float | None = None


@dataclass(frozen=True)
class Verification:
    """What the written files scored.

    Attributes:
        reasons: Why the scores may differ from the trial's; empty if they may not.
        scores: Each score, compared.
        quantization: How the search's weights were quantized; empty if they were these weights.
    """

    reasons: tuple[str, ...]
    scores: tuple[VerifiedScore, ...]
    quantization: str = ""

    @property
    def failures(self) -> list[str]:
        """A line for each score that differs by more than it may."""
        return [
            f"  {s.name}: {s.trial:.6g} in the trial, {s.reloaded:.6g} reloaded "
            f"(allowed difference {s.allowed:.2g})"
            for s in self.scores
            if not s.within
        ]


@dataclass(frozen=True)
class Verifier:
    """Scores written files against the base model as the search did, and compares.

    Attributes:
        directory: The run.
        trial: The trial that was written.
        prompts: The prompt sets that its scorers use, by name.
        source: The folder of the base model.
        dtype: The type that the writers are stored in.
        progress: Is notified of each stage.
    """

    directory: RunDirectory
    trial: Trial
    prompts: dict[str, PromptSet]
    source: Path
    dtype: torch.dtype
    progress: Progress

    def verify(self, folder: Path) -> Verification:
        """Reload `folder`, a whole model or an adapter for the base model, and score it.

        Raises:
            ModelError: the folder cannot be loaded.
            ScoreError: it cannot be scored.
        """
        recipe = self.directory.read_recipe()
        scorers = build_scorers(recipe.scorers, self.prompts, recipe.run.record_responses)
        with self.progress.stage("base model"):
            model = _language_model(self.directory, self.source)
            for scorer in scorers:
                scorer.prepare(model)
        assert self.trial.scorecard is not None
        searched = expected = self.trial.scorecard.scores
        quantization = str(self.directory.read_environment()["model"].get("quantization", ""))
        reasons = list(_why_inexact(self.directory, self.dtype, model.device))
        if quantization:
            with self.progress.stage("originals"):
                expected, reasons = self._score_in_memory(model, scorers)
        if _is_adapter(folder):
            reasons.append("an adapter is added to the layers' outputs, not to the weights")
        del model  # two models need not fit in memory
        gc.collect()
        torch.cuda.empty_cache()
        with self.progress.stage("verification"):
            model = self._reloaded(folder)
            scores = [scorer.score(model) for scorer in scorers]
        compared = tuple(
            replace(
                verify_score(wanted, reloaded, not reasons),
                quantized=first.value if quantization else None,
            )
            for first, wanted, reloaded in zip(searched, expected, scores, strict=True)
        )
        return Verification(tuple(reasons), compared, quantization)

    def _score_in_memory(
        self, model: LanguageModel, scorers: Sequence[Scorer]
    ) -> tuple[tuple[Score, ...], list[str]]:
        """Return what the plan scores on the originals, and why files may differ from that."""
        directions = self.directory.directions()
        assert directions is not None
        rows = tuple(
            WriterRow(**r.model_dump()) for r in self.directory.read_recipe().model.writers
        )
        away = where_weights_rest(model.module)
        cache = WeightCache(model.module, find_writers(model.module, rows, not away), "cpu")
        cache.attach(model)
        with cache.edited(self.trial.plan, directions):
            scores = tuple(scorer.score(model) for scorer in scorers)
        return scores, [HOOKED.format(away)] if cache.has_hooked_writers else []

    def _reloaded(self, folder: Path) -> LanguageModel:
        return _language_model(
            self.directory,
            self.source if _is_adapter(folder) else folder,
            folder if _is_adapter(folder) else None,
        )


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def verify_score(trial: Score, reloaded: Score, exact: bool) -> VerifiedScore:
    """Compare a score with the trial's: counts as counts, others relative to their size.

    Args:
        trial: The trial's score.
        reloaded: The written files' score.
        exact: Whether only rounding may tell them apart.
    """
    total = trial.detail.get("total")
    relative, absolute = EXACT if exact else CLOSE
    allowed = relative * abs(trial.value) + absolute
    if "hits" in trial.detail and total:
        allowed = 0.0 if exact else CLOSE_ANSWERS / total
    difference = abs(trial.value - reloaded.value)
    within = difference <= allowed or math.isclose(difference, allowed)
    return VerifiedScore(trial.name, trial.value, reloaded.value, allowed, within)


def _language_model(
    directory: RunDirectory, folder: Path, adapter: Path | None = None
) -> LanguageModel:
    recipe = directory.read_recipe()
    # in the stored type, which the exported files are loaded in too
    as_stored = {"revision": None, "dtype": "auto", "quantization": None}
    settings = recipe.model.model_copy(update=as_stored)
    module, tokenizer = load_model(str(folder), settings)
    if adapter is not None:
        from peft import PeftModel

        # wraps the layers of `module` in place
        PeftModel.from_pretrained(module, str(adapter)).eval().requires_grad_(False)
    model = LanguageModel(module, tokenizer, settings, recipe.run.batch_size)
    model.response_prefix = tuple(directory.read_environment()["response_prefix"])
    tuning = directory.tuning()
    if tuning is not None:
        model.use(tuning)
    return model


def _why_inexact(
    directory: RunDirectory, dtype: torch.dtype, device: torch.device
) -> Iterator[str]:
    """Yield what differs from the search, so that scores may differ too."""
    searched = directory.read_environment()
    stored = str(dtype).removeprefix("torch.")
    if stored != searched["model"]["dtype"]:
        yield f"the checkpoint is in {stored}, the search ran in {searched['model']['dtype']}"
    if searched["model"].get("offloaded"):
        yield HOOKED.format(searched["model"]["offloaded"])
    cuda = device.type == "cuda"
    here = f"({torch.cuda.get_device_name(device)})" if cuda else device.type
    if here not in searched["model"]["device"]:
        there = searched["model"]["device"]
        yield f"the search ran on {there}, the verification on {here.strip('()')}"
    for library in ("torch", "transformers"):
        if version(library) != searched["versions"][library]:
            yield f"{library} was {searched['versions'][library]}, and is {version(library)}"
