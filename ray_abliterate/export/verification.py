"""Scores a written model as the search scored the trial, and holds the two beside each other.

A search on quantized weights scored another model than the one that is written. So its plan is
first applied to the full-precision originals in memory: what that scores, the files must score.
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
from ray_abliterate.model.architecture import WriterRow, find_writers
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.model.loading import load, where_weights_rest
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.score import Score
from ray_abliterate.evaluation.scorers.scorer import Scorer

EXACT = (1e-6, 1e-9)
"""Relative and absolute difference of a score that is rounding alone."""
CLOSE = (0.1, 1e-3)
"""The same, where weights or arithmetic are not those of the search."""
CLOSE_ANSWERS = 3
"""Answers whose verdict may differ in that case."""
BESIDE = "weights that rest in {} were edited beside, which rounds outputs once more"


@dataclass(frozen=True)
class Comparison:
    """One score of the written files beside the trial's.

    Attributes:
        name: The score's.
        trial: In the trial; of its plan on the originals in memory, if the search was quantized.
        reloaded: Of the files.
        allowed: How far the two may be apart.
        within: They are not farther.
        quantized: In the trial, if the search was quantized.
    """

    name: str
    trial: float
    reloaded: float
    allowed: float
    within: bool
    quantized: float | None = None


@dataclass(frozen=True)
class Verification:
    """What the written files scored. `reasons` say why they may differ from the trial, if so;
    `quantization` is what the search ran on, if not on these weights."""

    reasons: tuple[str, ...]
    scores: tuple[Comparison, ...]
    quantization: str = ""

    @property
    def failures(self) -> list[str]:
        """A line per score that differs by more than it may."""
        return [
            f"  {s.name}: {s.trial:.6g} in the trial, {s.reloaded:.6g} reloaded "
            f"(allowed difference {s.allowed:.2g})"
            for s in self.scores
            if not s.within
        ]


@dataclass(frozen=True)
class Verifier:
    """Scores written files against the base model, as the search did, and compares.

    Attributes:
        directory: The run.
        trial: The trial that was written.
        prompts: What its scorers score.
        source: Folder of the base model.
        dtype: The type that the writers are stored in.
        progress: Receives what takes a while.
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
            ModelError: it cannot be loaded.
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
                expected, reasons = self._in_memory(model, scorers)
        if _is_adapter(folder):
            reasons.append("an adapter is added to the layers' outputs, not to the weights")
        del model
        gc.collect()
        torch.cuda.empty_cache()
        with self.progress.stage("verification"):
            model = self._reloaded(folder)
            scores = [scorer.score(model) for scorer in scorers]
        compared = tuple(
            replace(compare(old, new, not reasons), quantized=first.value if quantization else None)
            for first, old, new in zip(searched, expected, scores, strict=True)
        )
        return Verification(tuple(reasons), compared, quantization)

    def _in_memory(
        self, model: LanguageModel, scorers: Sequence[Scorer]
    ) -> tuple[tuple[Score, ...], list[str]]:
        """What the plan scores on the originals, and why files may differ from that."""
        directions = self.directory.directions()
        assert directions is not None
        rows = tuple(WriterRow(**r.model_dump()) for r in self.directory.read_recipe().model.writers)
        away = where_weights_rest(model.module)
        cache = WeightCache(model.module, find_writers(model.module, rows, not away), "cpu")
        if model.upcast is not None:
            cache.on_write = model.upcast.written
        model.original = cache.suspended
        with cache.edited(self.trial.plan, directions):
            found = tuple(scorer.score(model) for scorer in scorers)
        return found, [BESIDE.format(away)] if cache.closed else []

    def _reloaded(self, folder: Path) -> LanguageModel:
        return _language_model(
            self.directory,
            self.source if _is_adapter(folder) else folder,
            folder if _is_adapter(folder) else None,
        )


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def compare(trial: Score, reloaded: Score, exact: bool) -> Comparison:
    """Hold a score against the trial's: counts as counts, the rest relative to its size."""
    total = trial.detail.get("total")
    relative, absolute = EXACT if exact else CLOSE
    allowed = relative * abs(trial.value) + absolute
    if "hits" in trial.detail and total:
        allowed = 0.0 if exact else CLOSE_ANSWERS / total
    difference = abs(trial.value - reloaded.value)
    within = difference <= allowed or math.isclose(difference, allowed)
    return Comparison(trial.name, trial.value, reloaded.value, allowed, within)


def _language_model(
    directory: RunDirectory, folder: Path, adapter: Path | None = None
) -> LanguageModel:
    recipe = directory.read_recipe()
    # In the type that is exported: what the files are loaded in.
    own = {"revision": None, "dtype": "auto", "quantization": None}
    settings = recipe.model.model_copy(update=own)
    module, tokenizer = load(str(folder), settings)
    if adapter is not None:
        from peft import PeftModel

        # The layers of `module` are wrapped in place.
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
    """What is not as it was in the search."""
    then = directory.read_environment()
    stored = str(dtype).removeprefix("torch.")
    if stored != then["model"]["dtype"]:
        yield f"the checkpoint is in {stored}, the search ran in {then['model']['dtype']}"
    if then["model"].get("offloaded"):
        yield BESIDE.format(then["model"]["offloaded"])
    cuda = device.type == "cuda"
    here = f"({torch.cuda.get_device_name(device)})" if cuda else device.type
    if here not in then["model"]["device"]:
        yield f"the search ran on {then['model']['device']}, the verification on {here.strip('()')}"
    for library in ("torch", "transformers"):
        if version(library) != then["versions"][library]:
            yield f"{library} was {then['versions'][library]}, and is {version(library)}"
