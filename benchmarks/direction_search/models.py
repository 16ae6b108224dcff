"""The models that direction methods are compared on, and a search on one of them, without Ray.

Three are planted models on the demo's prompts: `clean`, whose words say something besides the
behaviour; `outliers`, the same with a few prompts that drive one unit of the residual stream far
out; `entangled`, the same with a second behaviour that is to stay, along a direction that is not
orthogonal to the first. The fourth is the demo's real model.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.direction_search.hypervolumes import SearchJob, SearchOutcome, key_of

if TYPE_CHECKING:
    from ray_abliterate.data.builtin.planted_model import PlantedTraits

EXTRACTED = 128
"""Prompts of each set whose residuals are extracted; seeds draw from these."""
EVERY = 32
"""In `outliers`, one of so many behaviour prompts has a word that no other has."""
OUTLYING = "glitch"
BATCH = 64

METHODS: dict[str, dict[str, Any]] = {
    **{
        name: {"method": name}
        for name in (
            "mean-difference",
            "median-difference",
            "geometric-median",
            "median-of-means",
            "variance-scaled",
            "whitened",
            "pca-paired",
            "pca-centred",
            "contrastive-pca",
            "svd-subspace",
            "logistic-probe",
            "inlp",
            "leace",
        )
    },
    "ensemble": {
        "method": "ensemble",
        "ensemble": [
            {"method": "geometric-median", "weight": 0.7},
            {"method": "logistic-probe", "weight": 0.3, "options": {"l2": 0.1}},
        ],
    },
    "winsorized mean-difference": {"method": "mean-difference", "winsorize_quantile": 0.95},
}
"""What is compared: the recipe's `[direction]` by the name in tables."""


@dataclass(frozen=True)
class Subject:
    """How searches on a model are run.

    Attributes:
        norm: What edits preserve: nothing in a planted model, whose weight matrices are a few outer
            products, with rows that have no norms of their own.
        drawn: Prompts of each set that a seed draws to compute directions from.
        trials: Plans of a search.
        scored: Prompts of each of the two scored sets, none of which directions come from.
        tokens: Tokens of an answer.
    """

    norm: str
    drawn: int
    trials: int
    scored: int
    tokens: int


PLANTED = Subject("none", 24, 40, 32, 1)
SUBJECTS = {
    "clean": PLANTED,
    "outliers": PLANTED,
    "entangled": PLANTED,
    "demo": Subject("row", 96, 20, 20, 8),
}


def planted_traits(name: str) -> "PlantedTraits | None":
    """Return the traits of a planted model; None for the demo's."""
    from ray_abliterate.data.builtin.planted_model import PlantedTraits

    clean = PlantedTraits(layers=8, planted_layers=(3, 4, 5, 6), topic_loudness=0.7)
    traits = {
        "clean": clean,
        "outliers": replace(clean, outlier_words=(OUTLYING,)),
        "entangled": replace(clean, second_words=("how",), overlap=0.5),
    }
    return traits.get(name)


def search_key(name: str, method: str) -> str:
    """Return a digest of all that decides a search's result, besides seed, trials and points."""
    return key_of(SUBJECTS[name], planted_traits(name), METHODS[method], EXTRACTED)


REFERENCES = {
    "clean": (1.0, 0.1),
    "outliers": (1.0, 0.1),
    "entangled": (1.0, 0.1),
    "demo": (1.0, 0.2),
}
"""Rate and KL divergence that volumes are measured from, by model, the same for all methods: every
answer shows the behaviour, and about the most that a plan with the difference of means costs in
`clean`, or in the demo."""


class SearchBench:
    """One model in this process, and the residuals that all directions are computed from."""

    def __init__(self, name: str, folder: Path) -> None:
        from ray_abliterate.recipe import Recipe
        from ray_abliterate.replica.replica import Replica

        self.name, self.subject = name, SUBJECTS[name]
        self._sets = dict(prompts(name))
        values = recipe(str(model_folder(name, folder)), self.subject)
        self._recipe = Recipe.model_validate(values)
        scored = {kind: self._sets[kind] for kind in ("keyword-rate", "kl-divergence")}
        self._replica = Replica(self._recipe, self._recipe.model.name, scored, threads=1)
        self._tuning = self._replica.tune()
        self._shape = self._replica.describe().shape
        self._residuals = {kind: self._extracted(kind) for kind in ("behaviour", "neutral")}

    def run(self, job: SearchJob) -> SearchOutcome:
        """Compute directions, search with them, and return every plan's rate and divergence."""
        from ray_abliterate.replica.messages import TrialSetup

        started = time.perf_counter()
        directions, layer = self._directions(METHODS[job.method], job.seed)
        losses = tuple(self._search(job, TrialSetup(directions, (), self._tuning), layer))
        seconds = time.perf_counter() - started
        return SearchOutcome(job, losses, layer, self._cosine(directions, layer), round(seconds, 2))

    def base(self, method: str = "mean-difference") -> tuple[float, ...]:
        """Return the base model's rate and KL divergence."""
        from ray_abliterate.replica.messages import TrialSetup
        from ray_abliterate.search.plan import Plan

        directions, _ = self._directions(METHODS[method], 0)
        setup = TrialSetup(directions, (), self._tuning)
        return self._replica.evaluate(Plan.nothing(), setup).scorecard.losses

    def _extracted(self, kind: str) -> Any:
        """Return the residuals of a whole set, `"prompt layer hidden"`."""
        import numpy

        from ray_abliterate.directions.residuals.shard import ResidualShard

        shards = [
            ResidualShard(self._replica.extract_residuals(kind, 0, batch, (), self._tuning))
            for _, batch in self._sets[kind].batches(BATCH)
        ]
        return numpy.concatenate([shard.values() for shard in shards])

    def _directions(self, settings: dict[str, Any], seed: int) -> tuple[Any, int]:
        """Return directions from the prompts of a seed, and the layer that separates best."""
        import torch

        from ray_abliterate.directions.comparison.fitting import ContrastSets
        from ray_abliterate.directions.comparison.held_out import HeldOut, measure_held_out
        from ray_abliterate.directions.compute import directions_from_residuals
        from ray_abliterate.directions.layer_separation import best_layer
        from ray_abliterate.directions.residuals.folds import Folds
        from ray_abliterate.directions.residuals.residual_set import Residuals
        from ray_abliterate.directions.separability import CHANCE_LEVEL
        from ray_abliterate.recipe import DirectionSettings

        drawn = [
            values[draw(len(values), self.subject.drawn, seed)]
            for values in self._residuals.values()
        ]
        behaviour, neutral = (Residuals(torch.from_numpy(values)) for values in drawn)
        direction = DirectionSettings.model_validate(settings)
        folds = Folds.of(
            *([(name, i) for i in range(len(v))] for name, v in zip("bn", drawn, strict=True))
        )
        rows = []
        for layer in range(behaviour.layers):
            contrast = ContrastSets(
                *(
                    part.winsorized(direction.winsorize_quantile).values[:, layer].contiguous()
                    for part in (behaviour, neutral)
                )
            )
            result = measure_held_out(contrast, direction, folds) if contrast.means_differ else None
            measures = result.measures() if isinstance(result, HeldOut) else CHANCE_LEVEL
            rows.append({"layer": layer, **measures})
        # Below the planted layers nothing separates the sets, at every seed: no news.
        directions = directions_from_residuals(behaviour, neutral, direction, lambda text: None)
        return directions, best_layer(rows)

    def _search(self, job: SearchJob, setup: Any, layer: int) -> Iterator[tuple[float, ...] | None]:
        """Yield rate and divergence of each plan; None where it failed.

        Sampler, space and initial points are those of a run; plans are tried one at a time, so that
        the sampler knows all that came before.
        """
        import optuna

        from ray_abliterate.errors import ScoreError
        from ray_abliterate.recipe import SearchSettings
        from ray_abliterate.search.space import SearchSpace
        from ray_abliterate.search.study import make_sampler, optuna_distributions

        settings = SearchSettings(trials=job.trials, seed=job.seed)
        space = SearchSpace.of(self._shape, settings.space, self._recipe.edit.norm)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=make_sampler(settings, 0)
        )
        for point in space.initial_points(float(layer)) if job.seed_points else ():
            study.enqueue_trial(dict(point))
        domains = optuna_distributions(space)
        for _ in range(job.trials):
            asked = study.ask(domains)
            try:
                card = self._replica.evaluate(space.plan(asked.params), setup).scorecard
            except ScoreError:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
                yield None
                continue
            study.tell(asked, list(card.losses))
            yield tuple(round(loss, 7) for loss in card.losses)

    def _cosine(self, directions: Any, layer: int) -> float | None:
        """Return how much of the planted direction lies in a layer's directions."""
        from ray_abliterate.data.builtin.planted_model import planted_axes

        if planted_traits(self.name) is None:
            return None
        return round(float((directions.basis[layer] @ planted_axes()[0]).norm()), 4)


def draw(prompts: int, drawn: int, seed: int) -> list[int]:
    """Return the indices of the prompts that a seed draws: the same for all methods."""
    return sorted(random.Random(seed).sample(range(prompts), drawn))


def prompts(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the four prompt sets of a model with their names."""
    from ray_abliterate.data.prompt_sources import load_prompt_set
    from ray_abliterate.data.prompts import PromptSet
    from ray_abliterate.recipe import PromptSource

    subject, traits = SUBJECTS[name], planted_traits(name)
    sources = {
        "behaviour": ("cooking-train", EXTRACTED),
        "neutral": ("other-train", EXTRACTED),
        "keyword-rate": ("cooking-heldout", subject.scored),
        "kl-divergence": ("other-heldout", subject.scored),
    }
    outlying = traits is not None and traits.outlier_words
    for set_name, (builtin, count) in sources.items():
        prompt_set = load_prompt_set(
            name, PromptSource(builtin=builtin, split=f"[:{count}]"), Path()
        )
        if outlying and set_name == "behaviour":
            users = [
                prompt.user if number % EVERY else f"{prompt.user} {OUTLYING}"
                for number, prompt in enumerate(prompt_set.prompts)
            ]
            prompt_set = PromptSet.of(set_name, *users)
        yield set_name, prompt_set


def recipe(model: str, subject: Subject) -> dict[str, Any]:
    """Return the recipe's values for a subject; the replica is given the prompt sets themselves."""
    sources = {"behaviour": "cooking-train", "neutral": "other-train"}
    scorers = [
        {
            "kind": "keyword-rate",
            "prompts": {"builtin": "cooking-heldout"},
            "markers": "strict",
            "max_new_tokens": subject.tokens,
        },
        {"kind": "kl-divergence", "prompts": {"builtin": "other-heldout"}},
    ]
    return {
        "model": {"name": model, "dtype": "float32"},
        "prompts": {name: {"builtin": builtin} for name, builtin in sources.items()},
        "edit": {"norm": subject.norm},
        "search": {"dominance_stop": False},
        "scorers": scorers,
        "run": {"batch_size": BATCH},
    }


def model_folder(name: str, folder: Path) -> Path:
    """Return the model's folder; build the model if it is not there."""
    from ray_abliterate.data.builtin import demo_model as demo
    from ray_abliterate.data.builtin.planted_model import build_planted_model

    traits = planted_traits(name)
    if traits is None:
        return demo.build_demo_model(demo.demo_folder())
    return build_planted_model(folder / f"planted-{name}", traits=traits)
