"""The fast sampler suggests what Optuna's own does, and reads finished trials once."""

import warnings
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator

from ray_abliterate.recipe import SearchSettings, SpaceSettings
from ray_abliterate.search.plan import ModelShape
from ray_abliterate.search.space import SearchSpace
from ray_abliterate.search.study import make_sampler, optuna_distributions
from ray_abliterate.search.tpe_sampler import FastParzenEstimator, FastTPESampler

SPACE = SearchSpace.of(ModelShape(32, 64, ("attn", "mlp")), SpaceSettings(), "row")
DOMAINS = optuna_distributions(SPACE)


def scores(params: dict[str, Any]) -> tuple[float, float]:
    strength = params["attn.peak"] * params["attn.reach"] + params["mlp.peak"] * params["mlp.reach"]
    shared = params["direction_scope"] == "global"
    return round(10 / (1 + abs(strength)), 1), strength + 3 * shared + params["mlp.floor"]


def studied(sampler: TPESampler, trials: int, in_flight: int) -> list[dict[str, Any]]:
    """The plans of a study with plans in flight, a failure and an end in between."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    flying: list[Any] = []
    for number in range(trials):
        flying.append(study.ask(DOMAINS))
        if len(flying) == in_flight:
            ended = flying.pop(number % in_flight)
            if number == 20:
                study.tell(ended, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(ended, scores(ended.params))
    return [trial.params for trial in study.get_trials()]


def optunas(settings: SearchSettings) -> TPESampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TPESampler(
            n_startup_trials=settings.startup,
            n_ei_candidates=settings.ei_candidates,
            multivariate=True,
            constant_liar=True,
            seed=settings.seed,
        )


@pytest.mark.parametrize("in_flight", [1, 4])
def test_the_plans_are_those_of_optunas_sampler(in_flight: int) -> None:
    settings = SearchSettings(trials=120, seed=3, startup_trials=15)
    ours = make_sampler(settings, 0)
    assert isinstance(ours, FastTPESampler)
    plans, optunas_plans = studied(ours, 120, in_flight), studied(optunas(settings), 120, in_flight)
    for a, b in zip(plans, optunas_plans, strict=True):
        assert a.pop("direction_scope") == b.pop("direction_scope")
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


def density(kind: type[_ParzenEstimator], trials: int, domains: dict[str, Any]) -> _ParzenEstimator:
    random = np.random.RandomState(0)
    values = {n: observed(random, d, trials) for n, d in domains.items()}
    return kind(values, domains, TPESampler()._parzen_estimator_parameters)


def observed(random: np.random.RandomState, domain: Any, count: int) -> np.ndarray:
    if isinstance(domain, optuna.distributions.CategoricalDistribution):
        return random.randint(len(domain.choices), size=count).astype(float)
    values = random.uniform(domain.low, domain.high, size=count)
    values[: count // 10] = domain.low  # kernels at a bound, and all alike
    return values


@pytest.mark.parametrize("trials", [0, 1, 30, 2000])
def test_densities_are_optunas_to_nine_digits(trials: int) -> None:
    ours, optunas_own = (
        density(FastParzenEstimator, trials, DOMAINS),
        density(_ParzenEstimator, trials, DOMAINS),
    )
    candidates = optunas_own.sample(np.random.RandomState(1), 128)
    corners = {n: np.append(v, getattr(DOMAINS[n], "high", 1)) for n, v in candidates.items()}
    np.testing.assert_allclose(
        ours.log_pdf(corners), optunas_own.log_pdf(corners), rtol=1e-9, atol=1e-9
    )


def test_a_space_without_real_parameters_has_a_density_too() -> None:
    domains = {"a": optuna.distributions.CategoricalDistribution(("x", "y", "z"))}
    ours, optunas_own = (
        density(FastParzenEstimator, 9, domains),
        density(_ParzenEstimator, 9, domains),
    )
    candidates = {"a": np.array([0.0, 1.0, 2.0])}
    np.testing.assert_allclose(ours.log_pdf(candidates), optunas_own.log_pdf(candidates))


def test_a_finished_trial_is_read_once() -> None:
    read: list[int] = []

    class Counting(FastTPESampler):
        def _get_params(self, trial: Any, study: Any) -> Any:
            read.append(trial.number)
            return super()._get_params(trial, study)

    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=Counting(n_startup_trials=5, multivariate=True, constant_liar=True, seed=0),
    )
    for _ in range(30):
        asked = study.ask(DOMAINS)
        study.tell(asked, scores(asked.params))
    assert sorted(set(read)) == list(range(29)) and len(read) == 29
