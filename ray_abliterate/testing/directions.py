"""What every direction method must do. Subclass the contract, name your method, and run pytest.

class TestMine(DirectionMethodContract):
    method = "my_package.methods:mine"
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_abliterate.directions import Directions, compute
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.residuals import Residuals


def planted_residuals(
    seed: int, prompts: int = 200, layers: int = 4, hidden: int = 32, strength: float = 6.0
) -> tuple[Residuals, Residuals, Tensor]:
    """Two sets of Gaussian residuals, the first moved along a unit direction, and that direction.

    The direction is orthogonal to the neutral mean, so that projecting the mean out keeps it.
    """
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(hidden, 2, generator=random)).Q
    planted, mean = basis[:, 0], basis[:, 1]
    behaviour = torch.randn(prompts, layers, hidden, generator=random) + 2 * mean
    neutral = torch.randn(prompts + 3, layers, hidden, generator=random) + 2 * mean
    return Residuals(behaviour + strength * planted), Residuals(neutral), planted


class DirectionMethodContract:
    """Held by every method in `directions.METHODS`, and by yours."""

    method: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def directions(
        self, behaviour: Residuals, neutral: Residuals, project: bool = True
    ) -> Directions:
        """What the method finds."""
        settings = DirectionSettings(
            method=self.method, options=self.options, project_out_neutral=project
        )
        return compute(behaviour, neutral, settings)

    def test_rows_are_unit_and_finite(self) -> None:
        """One unit vector per layer."""
        behaviour, neutral, _ = planted_residuals(seed=0)
        found = self.directions(behaviour, neutral)
        assert found.vectors.shape == behaviour.values.shape[1:]
        torch.testing.assert_close(found.vectors.norm(dim=-1), torch.ones(found.layers))

    def test_a_planted_direction_is_found(self) -> None:
        """Cosine above 0.99 at six standard deviations and 200 prompts."""
        behaviour, neutral, planted = planted_residuals(seed=0)
        cosines = self.directions(behaviour, neutral).vectors @ planted
        assert cosines.min() > 0.99

    def test_it_points_from_neutral_to_behaviour(self) -> None:
        """Swapping the sets flips the sign."""
        behaviour, neutral, _ = planted_residuals(seed=0)
        there = self.directions(behaviour, neutral, project=False)
        back = self.directions(neutral, behaviour, project=False)
        assert ((there.vectors * back.vectors).sum(-1) < -0.98).all()

    def test_the_order_of_prompts_does_not_matter(self) -> None:
        """Up to rounding: float64 sums, one rounding to float32."""
        behaviour, neutral, _ = planted_residuals(seed=0)
        shuffled = Residuals(behaviour.values.flip(0))
        one, other = self.directions(behaviour, neutral), self.directions(shuffled, neutral)
        torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=1e-6)

    def test_sets_of_unequal_size_are_fine(self) -> None:
        """No pairing of prompts is assumed."""
        behaviour, neutral, planted = planted_residuals(seed=0)
        fewer = Residuals(behaviour.values[:150])
        assert (self.directions(fewer, neutral).vectors @ planted).min() > 0.98
