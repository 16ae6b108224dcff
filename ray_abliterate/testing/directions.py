"""What every direction method must do. Subclass the contract, name your method, and run pytest.

class TestMyMethod(DirectionMethodContract):
    method = "my_package.methods:my_method"

Where a method cannot do something by its nature, the subclass says so (`bears_outliers = False`),
and the contract does not test it.
"""

from functools import reduce
from operator import add
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ray_abliterate.directions.compute import directions_from_layers, directions_from_residuals
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.methods.inputs import Layer, Sample, Summary
from ray_abliterate.directions.methods.recipe_methods import need_of
from ray_abliterate.directions.residuals.moments import Moments, PairedMoments, moments_of, rows_of
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.recipe import DirectionSettings


def planted_residuals(
    seed: int, prompts: int = 200, layers: int = 4, hidden: int = 32, strength: float = 6.0
) -> tuple[Residuals, Residuals, Tensor]:
    """Return two sets of Gaussian residuals, the first shifted along a unit direction, and that.

    The direction is orthogonal to the neutral mean, so that projecting the mean out leaves it.

    Args:
        seed: Draws the residuals and the direction.
        prompts: Prompts of the behaviour; there are three more neutral ones.
        layers: Number of layers.
        hidden: Width of the stream.
        strength: How far the behaviour is shifted, in standard deviations.
    """
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(hidden, 2, generator=random)).Q
    planted, mean = basis[:, 0], basis[:, 1]
    behaviour = torch.randn(prompts, layers, hidden, generator=random) + 2 * mean
    neutral = torch.randn(prompts + 3, layers, hidden, generator=random) + 2 * mean
    return Residuals(behaviour + strength * planted), Residuals(neutral), planted


def with_outliers(residuals: Residuals, share: float = 0.02, size: float = 300.0) -> Residuals:
    """Return the residuals with some prompts far out, all in the same direction."""
    values = residuals.values.clone()
    away = torch.randn(values.shape[2], generator=torch.Generator().manual_seed(99))
    values[: max(1, int(share * len(values)))] += size * away / away.norm()
    return Residuals(values)


class DirectionMethodContract:
    """Held by every method of this package, and by yours.

    Attributes:
        method: The method, as the recipe names it.
        options: Its keyword arguments.
        cosine: The least cosine with the planted direction, at six standard deviations, 200 prompts
            and 32 units. Methods that weigh units by how they vary give up some of it.
        bears_outliers: Whether it finds the direction although 2 % of the prompts are far out.
        pairs_prompts: Whether prompt i of one set belongs to prompt i of the other, so that sets
            are of equal size, and are reordered together.
    """

    method: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    cosine: ClassVar[float] = 0.99
    bears_outliers: ClassVar[bool] = True
    pairs_prompts: ClassVar[bool] = False

    def settings(self, project: bool = True, **more: Any) -> DirectionSettings:
        """Return the recipe's `[direction]` section for the method."""
        return DirectionSettings(
            method=self.method, options=self.options, project_out_neutral=project, **more
        )

    def directions(
        self, behaviour: Residuals, neutral: Residuals, project: bool = True, **more: Any
    ) -> Directions:
        """Return the directions that the method finds in two sets."""
        if self.pairs_prompts:
            count = min(len(behaviour.values), len(neutral.values))
            behaviour = Residuals(behaviour.values[:count])
            neutral = Residuals(neutral.values[:count])
        return directions_from_residuals(behaviour, neutral, self.settings(project, **more))

    def test_rows_are_unit_and_finite(self) -> None:
        """There is one unit vector for each layer; several are orthonormal."""
        behaviour, neutral, _ = planted_residuals(seed=0)
        directions = self.directions(behaviour, neutral)
        assert directions.vectors.shape == behaviour.values.shape[1:]
        torch.testing.assert_close(directions.vectors.norm(dim=-1), torch.ones(directions.layers))
        products = directions.basis @ directions.basis.mT
        expected = torch.eye(directions.rank).expand(directions.layers, -1, -1)
        torch.testing.assert_close(products, expected, rtol=0, atol=1e-5)

    def test_a_planted_direction_is_found(self) -> None:
        """It is found among noise, at six standard deviations and 200 prompts."""
        behaviour, neutral, planted = planted_residuals(seed=0)
        cosines = self.directions(behaviour, neutral).vectors @ planted
        assert cosines.min() > self.cosine

    def test_it_points_from_neutral_to_behaviour(self) -> None:
        """Swapping the sets flips the sign."""
        behaviour, neutral, _ = planted_residuals(seed=0)
        forward = self.directions(behaviour, neutral, project=False)
        backward = self.directions(neutral, behaviour, project=False)
        assert ((forward.vectors * backward.vectors).sum(-1) < -0.98).all()

    def test_the_order_of_prompts_does_not_matter(self) -> None:
        """Directions are the same up to rounding: float64 sums, one rounding to float32."""
        behaviour, neutral, _ = planted_residuals(seed=0)
        one = self.directions(behaviour, neutral)
        order = torch.randperm(len(behaviour.values), generator=torch.Generator().manual_seed(1))
        shuffled, same = Residuals(behaviour.values[order]), neutral
        if self.pairs_prompts:
            same = Residuals(neutral.values[: len(order)][order])
        other = self.directions(shuffled, same)
        assert_same_directions(one, other, 1e-6)

    def test_sets_of_unequal_size_are_fine(self) -> None:
        """Methods that pair prompts refuse them with an explanation."""
        behaviour, neutral, planted = planted_residuals(seed=0)
        fewer = Residuals(behaviour.values[:150])
        if self.pairs_prompts:
            with pytest.raises(ValueError, match="equal size"):
                directions_from_residuals(fewer, neutral, self.settings())
            return
        assert (self.directions(fewer, neutral).vectors @ planted).min() > self.cosine - 0.01

    @pytest.mark.parametrize("rows", [3, 64])
    def test_shards_give_what_whole_sets_give(self, rows: int) -> None:
        """They do to 1e-6 in any split, reduced to what the method declares that it needs."""
        sets = planted_residuals(seed=3, prompts=40)[:2]
        if self.pairs_prompts:
            sets = sets[0], Residuals(sets[1].values[:40])
        whole = directions_from_residuals(*sets, self.settings())
        shards = [
            [
                ResidualShard.of("s", i, s.values[i : i + rows].numpy()).batch
                for i in range(0, len(s.values), rows)
            ]
            for s in sets
        ]
        need = need_of(self.settings())
        layers = [
            Layer(*(_reduced(need, batches, layer) for batches in shards))
            for layer in range(sets[0].layers)
        ]
        assert_same_directions(directions_from_layers(layers, self.settings(), {}), whole, 1e-6)

    def test_outliers_do_not_turn_it(self) -> None:
        """Or winsorising catches them, which every method can be used with."""
        behaviour, neutral, planted = planted_residuals(seed=4, hidden=64)
        wild = with_outliers(behaviour)
        if self.bears_outliers:
            assert (self.directions(wild, neutral).vectors @ planted).min() > self.cosine - 0.02
            return
        spiky = behaviour.values.clone()
        spiky[0, :, 7] = 1e4  # a massive activation: one unit of one prompt
        directions = self.directions(Residuals(spiky), neutral, winsorize_quantile=0.95)
        assert (directions.vectors @ planted).min() > 0.85

    def test_fewer_prompts_than_units_are_fine(self) -> None:
        """Ten prompts in 300 dimensions give unit vectors, too."""
        behaviour, neutral, planted = planted_residuals(
            seed=5, prompts=10, layers=2, hidden=300, strength=30.0
        )
        directions = self.directions(behaviour, neutral)
        torch.testing.assert_close(directions.vectors.norm(dim=-1), torch.ones(2))
        assert (directions.vectors @ planted).min() > 0.85

    def test_one_prompt_per_set_is_fine(self) -> None:
        """Its direction is their difference, without its part along the neutral mean."""
        behaviour, neutral, planted = planted_residuals(seed=6, prompts=1, strength=30.0)
        one = Residuals(behaviour.values[:1]), Residuals(neutral.values[:1])
        assert (self.directions(*one).vectors @ planted).min() > 0.9

    def test_prompts_that_occur_twice_change_little(self) -> None:
        """Both sets are doubled, prompt by prompt."""
        behaviour, neutral, planted = planted_residuals(seed=7)
        one, other = (Residuals(s.values.repeat_interleave(2, dim=0)) for s in (behaviour, neutral))
        vectors = self.directions(one, other).vectors
        assert (vectors @ planted).min() > self.cosine - 0.01

    def test_identical_sets_are_refused(self) -> None:
        """The error says that no layer has a direction."""
        residuals = planted_residuals(seed=8)[0]
        with pytest.raises(ValueError, match="no layer has a direction"):
            self.directions(residuals, residuals)

    def test_a_layer_where_all_residuals_are_one_has_no_direction(self) -> None:
        """So it is after the embedding of a last token that all prompts share."""
        behaviour, neutral, planted = planted_residuals(seed=9)
        one, other = behaviour.values.clone(), neutral.values.clone()
        one[:, 0], other[:, 0] = 1.0, 1.0
        directions = self.directions(Residuals(one), Residuals(other))
        assert directions.usable == (False, True, True, True)
        assert (directions.vectors[1:] @ planted).min() > self.cosine - 0.01


def assert_same_directions(one: Directions, other: Directions, tolerance: float) -> None:
    """Assert that the first directions are equal, and the subspaces of all."""
    torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=tolerance)
    projectors = [directions.basis.mT @ directions.basis for directions in (one, other)]
    torch.testing.assert_close(*projectors, rtol=0, atol=2 * tolerance)


def _reduced(need: str, batches: list[Any], layer: int) -> Any:
    """Return one layer of some shards, reduced to what a method needs."""
    if need in ("means", "variances"):
        return Summary(reduce(add, map(moments_of, batches)).layer(layer))
    rows = [rows_of(batch, layer) for batch in batches]
    hidden = rows[0].values.shape[1]
    if need == "covariances":
        return Summary(reduce(add, rows, PairedMoments(Moments.empty(hidden))).moments)
    return Sample(torch.from_numpy(reduce(add, rows).values), hidden)
