"""Comparing methods: held-out halves, samples that share no prompt, and what is recommended."""

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy
import pytest
import torch

from ray_abliterate.directions.comparison.compare import compare_methods
from ray_abliterate.directions.comparison.fitting import ContrastSets, PromptSample
from ray_abliterate.directions.comparison.held_out import HeldOut, measure_held_out, random_halves
from ray_abliterate.directions.comparison.recommendation import MethodCandidate, recommend_method
from ray_abliterate.directions.comparison.stability import (
    Stability,
    measure_stability,
    prompts_needed,
    reliability,
    sample_sizes,
    spearman_brown,
)
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.testing.directions import planted_residuals, with_outliers

MEAN = DirectionSettings(project_out_neutral=False)


class Whole:
    """Residuals in memory, a layer at a time."""

    def __init__(self, residuals: Residuals) -> None:
        self.residuals = residuals
        self.layers = residuals.layers

    def layer(self, index: int) -> numpy.ndarray:
        return self.residuals.values[:, index].numpy()


def noise(count: int, hidden: int, seed: int = 0, gap: float = 0.0) -> ContrastSets:
    random = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(count, hidden, generator=random) for _ in range(2))
    one[:, 0] += gap
    return ContrastSets(one + 1, other + 1)


def named(*methods: str) -> dict[str, DirectionSettings]:
    return {name: DirectionSettings(method=name) for name in methods}


# Fits


@pytest.mark.parametrize("method", ["whitened", "logistic-probe", "pca-centred"])
def test_a_fit_in_the_span_is_the_fit_in_all_units(method):
    behaviour, neutral, _ = planted_residuals(3, prompts=20, layers=1, hidden=300)
    settings = DirectionSettings(method=method)
    sets = ContrastSets(behaviour.values[:, 0], neutral.values[:, 0])
    axes, basis = sets.axes(settings)
    assert basis is not None and axes.behaviour.shape == (20, 43)
    found = basis @ sets.fit(settings).vector
    whole = directions_from_residuals(behaviour, neutral, settings).vectors[0].double()
    assert torch.allclose(found, whole, atol=1e-6)


def test_what_looks_at_single_units_is_fit_in_all_of_them():
    sets = noise(10, 100)
    axes, basis = sets.axes(DirectionSettings(method="median-difference"))
    assert basis is None and axes.behaviour.shape == (10, 100)


def test_a_fit_of_some_prompts_sees_no_others():
    sets = noise(12, 40)
    choice = PromptSample(numpy.arange(6), numpy.arange(3, 9))
    wild = ContrastSets(sets.behaviour.clone(), sets.neutral.clone())
    wild.behaviour[6:], wild.neutral[:3], wild.neutral[9:] = 1e3, -1e3, 77.0
    found, same = (s.fit(MEAN, choice).vector for s in (sets, wild))
    assert torch.equal(found, same)


def test_a_method_that_cannot_says_why():
    sets = ContrastSets(torch.randn(4, 9), torch.randn(5, 9))
    found = sets.fit(DirectionSettings(method="pca-paired"))
    assert found.vector is None and "equal size" in found.problem


def test_warnings_about_a_single_layer_are_dropped(caplog):
    same = torch.ones(4, 6)
    with caplog.at_level(logging.WARNING):
        assert ContrastSets(same, same.clone()).fit(MEAN).vector is None
    assert not caplog.records


# Held-out prompts


def test_each_half_is_measured_along_the_direction_of_the_other():
    sets = noise(21, 60, gap=2.0)
    folds = random_halves(sets.counts, 5)
    assert folds is not None
    found = measure_held_out(sets, MEAN, folds)
    assert isinstance(found, HeldOut)
    own = [[torch.from_numpy(side == fold) for side in folds.sides] for fold in (0, 1)]
    vectors = []
    for behaviour, neutral in own:
        gap = sets.behaviour[behaviour].double().mean(0) - sets.neutral[neutral].double().mean(0)
        vectors.append((gap / gap.norm()).numpy())
    for (behaviour, neutral), vector in zip(own, reversed(vectors), strict=True):
        a = sets.behaviour[behaviour].double().numpy() @ vector
        b = sets.neutral[neutral].double().numpy() @ vector
        middle = (a.mean() + b.mean()) / 2
        assert numpy.allclose(found.behaviour[behaviour], a - middle, atol=1e-6)
        assert numpy.allclose(found.neutral[neutral], b - middle, atol=1e-6)
    assert found.agreement == pytest.approx(vectors[0] @ vectors[1], abs=1e-6)


def test_halves_hold_each_prompt_once_and_keep_pairs_together():
    found = random_halves((9, 9), 0)
    assert sorted(numpy.bincount(found.behaviour)) == [4, 5]
    assert numpy.array_equal(found.behaviour, found.neutral)
    found = random_halves((9, 6), 0)
    assert numpy.bincount(found.neutral).tolist() == [3, 3]


def test_sets_that_do_not_differ_are_not_separated_however_many_units_there_are():
    areas = []
    for seed in range(20):
        sets = noise(40, 2000, seed)
        found = measure_held_out(sets, MEAN, random_halves(sets.counts, seed))
        areas.append(found.measures()["auroc"])
        along = [s.double() @ (sets.fit(MEAN).vector) for s in (sets.behaviour, sets.neutral)]
        assert (
            along[0][:, None] > along[1]
        ).double().mean() > 0.999  # along their own direction they are
    assert numpy.mean(areas) == pytest.approx(0.5, abs=0.06)


def test_sets_of_one_prompt_have_no_halves():
    assert random_halves((1, 9), 0) is None
    found = measure_held_out(ContrastSets(torch.ones(1, 3), torch.zeros(1, 3)), MEAN, None)
    assert "no halves" in found.problem


# Stability


def test_sizes_double_up_to_half_of_the_smaller_set():
    assert sample_sizes((128, 200)) == (8, 16, 32, 64)
    assert sample_sizes((100, 100)) == (8, 16, 32, 50)
    assert sample_sizes((10, 40)) == (5,)
    assert sample_sizes((1, 9)) == ()


def test_cosines_of_samples_are_those_that_new_prompts_would_give():
    """Of δ and noise of variance 2/n in each of h units: δ² / (δ² + 2h/n), whatever the sample."""
    gap, hidden = 3.0, 200
    found = [measure_stability(noise(256, hidden, seed, gap), MEAN, pairs=6) for seed in range(3)]
    for place, size in enumerate((8, 16, 32, 64, 128)):
        mean = numpy.mean([points[place].mean for points in found])
        assert found[0][place].prompts == size
        assert mean == pytest.approx(gap**2 / (gap**2 + 2 * hidden / size), abs=0.03)


def test_where_there_is_nothing_samples_do_not_agree_as_bootstrap_samples_do():
    sets = noise(128, 1000)
    points = measure_stability(sets, MEAN)
    assert all(abs(point.mean) < 0.1 for point in points)
    random = numpy.random.default_rng(0)
    drawn = [PromptSample(*random.integers(0, 128, (2, 128))) for _ in range(2)]
    one, other = (sets.fit(MEAN, choice).vector for choice in drawn)
    assert one @ other == pytest.approx(0.5, abs=0.1)
    assert reliability(points, 128) < 0.4


def test_reliability_is_the_cosine_with_the_truth():
    gap, hidden, prompts = 2.0, 100, 200
    truth, guessed = [], []
    for seed in range(6):
        sets = noise(prompts, hidden, seed, gap)
        truth.append(abs(float(sets.fit(MEAN).vector[0])))
        guessed.append(reliability(measure_stability(sets, MEAN, pairs=10), prompts))
    assert numpy.mean(guessed) == pytest.approx(numpy.mean(truth), abs=0.03)
    points = (Stability(50, (0.5, 0.7)),)
    wanted = prompts_needed(points, 0.95)
    assert wanted is not None
    assert reliability(points, wanted) == pytest.approx(0.95, abs=0.002)


def test_what_cannot_be_extrapolated_is_not():
    assert spearman_brown(0.5, 1.0) == 0.5
    assert spearman_brown(0.5, 2.0) == pytest.approx(2 / 3)
    assert spearman_brown(-0.2, 4.0) == -0.2
    assert prompts_needed((Stability(8, (-0.1, 0.05)),), 0.9) is None
    assert prompts_needed((), 0.9) is None
    assert math.isnan(reliability((), 10))
    assert math.isnan(reliability((Stability(8, ()),), 10))


# All of it


def test_methods_are_compared_layer_by_layer_and_the_planted_layer_is_found():
    behaviour, neutral, planted = planted_residuals(0, prompts=60, layers=5, hidden=48)
    quiet = behaviour.values.clone()
    quiet[:, 0] -= 6 * planted  # nothing there
    quiet[:, 1:3] -= 4 * planted
    steps = []
    found = compare_methods(
        Whole(Residuals(quiet)), Whole(neutral), named("mean-difference", "pca-paired", "whitened"),
        pairs=3, step=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert found.methods == ("mean-difference", "whitened")
    assert "equal size" in found.failed["pca-paired"]
    assert found.layer == 3
    assert found.counts == (60, 63) and (found.layers, found.hidden) == (5, 48)
    rows = found.separation["mean-difference"]
    assert rows[0]["auroc"] < 0.65 < 0.75 < rows[1]["auroc"] < rows[3]["auroc"]
    assert steps == [(done, 8) for done in range(1, 8)]
    vectors = [
        directions_from_residuals(
            Residuals(quiet), neutral, DirectionSettings(method=name)
        ).vectors[3]
        for name in found.methods
    ]
    assert found.cosines[3][0, 1] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
    assert found.mean_cosines[0, 1] == pytest.approx(
        numpy.mean([matrix[0, 1] for matrix in found.cosines])
    )
    assert found.advice.method == "mean-difference"
    own = directions_from_residuals(Residuals(quiet), neutral, DirectionSettings()).vectors.numpy()
    assert numpy.allclose(found.layer_cosines, own @ own.T, atol=1e-5)


def test_cosines_of_what_was_fit_in_the_span_are_those_in_the_stream():
    sets = planted_residuals(5, prompts=12, layers=1, hidden=100)[:2]
    found = compare_methods(
        *map(Whole, sets), named("mean-difference", "whitened", "pca-centred"), pairs=2
    )
    vectors = [
        directions_from_residuals(*sets, DirectionSettings(method=name)).vectors[0].double()
        for name in found.methods
    ]
    direct = [[float(one @ other) for other in vectors] for one in vectors]
    assert numpy.allclose(found.cosines[0], direct, atol=1e-5)


def test_a_layer_without_a_difference_has_no_row_and_no_cosine():
    behaviour, neutral, _ = planted_residuals(1, prompts=20, layers=2)
    one, other = behaviour.values.clone(), neutral.values.clone()
    one[:, 0], other[:, 0] = 1.0, 1.0
    found = compare_methods(
        Whole(Residuals(one)), Whole(Residuals(other)), named("mean-difference"), pairs=2
    )
    assert found.separation["mean-difference"][0] is None
    assert numpy.isnan(found.cosines[0]).all() and found.cosines[1][0, 0] == pytest.approx(1)
    assert found.layer == 1
    plain = found.to_json()
    assert plain["cosines"][0] == [[None]] and plain["separation"]["mean-difference"][0] is None


def test_sets_that_are_the_same_are_refused():
    same = Whole(planted_residuals(2, prompts=10)[0])
    with pytest.raises(ValueError, match="don't differ in any layer"):
        compare_methods(same, same, named("mean-difference"))


def test_a_robust_method_is_recommended_where_there_are_outliers():
    behaviour, neutral, _ = planted_residuals(4, prompts=100, layers=1, hidden=64, strength=3)
    wild = Whole(with_outliers(behaviour, share=0.04))
    found = compare_methods(
        wild, Whole(neutral), named("mean-difference", "geometric-median"), pairs=4
    )
    assert found.advice.method == "geometric-median"
    assert found.reliability_of("mean-difference") > 0.9  # it finds the outliers, and steadily


def test_winsorising_is_done_before_anything_is_fit():
    behaviour, neutral, _ = planted_residuals(4, prompts=40, layers=1, hidden=64)
    spiky = behaviour.values.clone()
    spiky[0, :, 7] = 1e4
    plain, clamped = (
        compare_methods(
            Whole(Residuals(spiky)), Whole(neutral),
            {"mean-difference": DirectionSettings(winsorize_quantile=quantile)}, pairs=2,
        )
        for quantile in (1.0, 0.95)
    )  # fmt: skip
    assert clamped.best("mean-difference")["auroc"] > 0.99 > plain.best("mean-difference")["auroc"]


# Advice


def standing(auroc: float, cosine: float = 0.9) -> MethodCandidate:
    return MethodCandidate(3, auroc, (Stability(32, (cosine, cosine)),))


def test_the_simplest_method_near_the_best_is_recommended():
    advice = recommend_method({"simple": standing(0.97), "clever": standing(0.98)}, (64, 64))
    assert advice.method == "simple"
    assert "the best is clever with 0.980" in advice.reasons[0]
    assert "simplest" in advice.reasons[1]
    assert "enough" in advice.reasons[2]


def test_a_method_that_is_clearly_better_is_recommended():
    advice = recommend_method({"simple": standing(0.7), "clever": standing(0.98)}, (64, 64))
    assert advice.method == "clever"
    assert "best: AUROC 0.980" in advice.reasons[0]


def test_a_method_that_is_as_good_and_clearly_more_reliable_is_recommended():
    advice = recommend_method(
        {"simple": standing(0.98, 0.3), "steady": standing(0.98, 0.9)}, (64, 64)
    )
    assert advice.method == "steady"
    assert "more reliable than simple" in " ".join(advice.reasons)


def test_too_few_prompts_and_weak_separation_are_reported():
    few = recommend_method({"simple": standing(0.95, 0.5)}, (64, 64)).reasons
    assert any("about 300 per set would make it 0.95" in reason for reason in few)
    nothing = recommend_method({"simple": standing(0.55, -0.1)}, (64, 64)).reasons
    assert any("do not agree on any direction" in reason for reason in nothing)
    assert any("0.55 is weak" in reason for reason in nothing)
    one = replace(standing(0.95), stability=())
    assert any(
        "too few to tell" in reason for reason in recommend_method({"simple": one}, (1, 1)).reasons
    )
    with pytest.raises(ValueError, match="no method"):
        recommend_method({}, (2, 2))


def test_fits_drop_their_own_warnings_and_nobody_elses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They run beside each other, in threads that begin and end in any order."""
    mean = torch.zeros(8, 8)
    mean[:, 0] = 1.0
    # the direction is parallel to the neutral mean
    sets, spared = ContrastSets(3 * mean, mean), DirectionSettings()
    with ThreadPoolExecutor(8) as threads:
        assert all(found.vector is not None for found in threads.map(sets.fit, [spared] * 64))
    assert not caplog.records
    directions_from_residuals(Residuals(3 * mean[:, None]), Residuals(mean[:, None]), spared)
    assert "parallel to the neutral mean" in caplog.text
