"""Draw which parameters of a plan decide how good it is."""

import warnings
from typing import Any

from ray_abliterate.report.figures.plotly_parts import Figure, figure, view
from ray_abliterate.report.run_data import RunData, escape_text
from ray_abliterate.search.plan import ParameterValue
from ray_abliterate.search.score_text import number_text
from ray_abliterate.search.space import CategoricalRange, RealRange

ENOUGH_TRIALS = 8
"""Fewer finished trials would make parameter importances noise."""


def importance_figure(run: RunData) -> tuple[Figure, str]:
    """Return the share of each parameter in reaching the best trials, or why there is no figure.

    PED-ANOVA (Watanabe et al. 2023), because optuna's other evaluators need scikit-learn.
    """
    empty, done = figure("Parameter importance", "", []), len(run.finished)
    if done < ENOUGH_TRIALS:
        return empty, f"{done} trials finished; importances need {ENOUGH_TRIALS}."
    shares = {
        score.name: _importances(run, [card.losses[index] for _, card in run.finished])
        for index, score in enumerate(run.objectives)
    }
    missing = [name for name, share in shares.items() if not share]
    note = f"All trials have about the same {' and '.join(missing)}: there is nothing to explain."
    known = {name: share for name, share in shares.items() if share}
    if not known:
        return empty, note
    totals = {p: sum(share[p] for share in known.values()) for p in next(iter(known.values()))}
    order = sorted(totals, key=lambda parameter: -totals[parameter])
    data = [
        {"type": "bar", "orientation": "h", "name": escape_text(name), "y": order}
        | {"x": [share[p] for p in order], "marker": {"color": f"var(--c{index % 6})"}}
        for index, (name, share) in enumerate(known.items())
    ]
    y = {"title": {"text": "parameter"}, "autorange": "reversed"}
    bars = view("importance", data, "share", y, height=120 + (14 + 12 * len(known)) * len(order))
    about = (
        "How much each parameter decides whether a trial is among the best of an objective "
        "(PED-ANOVA; the shares of an objective add up to 1). With few trials this is rough."
    )
    alt = ". ".join(
        f"{name}: " + ", ".join(f"{p} {number_text(share[p])}" for p in order[:3])
        for name, share in known.items()
    )
    return figure("Parameter importance", about, [bars], alt), note if missing else ""


def _importances(run: RunData, values: list[float]) -> dict[str, float]:
    """Return the share of each parameter; nothing if the trials do not differ enough."""
    import optuna

    points = [trial.plan.to_params() for trial, _ in run.finished]
    bounds = dict(run.space.parameters) if run.space else {}
    names = [name for name in points[0] if all(name in point for point in points)]
    domains = {name: _domain([p[name] for p in points], bounds.get(name)) for name in names}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)
    for point, value in zip(points, values, strict=True):
        params = {name: point[name] for name in names}
        study.add_trial(optuna.create_trial(params=params, distributions=domains, value=value))
    quantile = min(0.9, max(0.1, 5 / len(values)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal trials: the report says so instead
        shares = evaluator.evaluate(study)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()} if total > 0 else {}


def _domain(values: list[ParameterValue], bounds: RealRange | CategoricalRange | None) -> Any:
    """Return Optuna's distribution of one parameter, wide enough for every value that was tried."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    texts = [value for value in values if isinstance(value, str)]
    if texts:
        options = bounds.options if isinstance(bounds, CategoricalRange) else ()
        return CategoricalDistribution(sorted({*texts, *options}))
    ends = [bounds.low, bounds.high] if isinstance(bounds, RealRange) else []
    reals = [float(value) for value in values] + ends
    return FloatDistribution(min(reals), max(reals))
