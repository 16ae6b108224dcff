"""What plans do to the writers of a model: products with directions, computed once, and edits.

Knows nothing about where weights are: in a model's memory (`weights`), or in files (`exporting`).
"""

from collections.abc import Container, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ray_abliterate.ablation import edit as ablation
from ray_abliterate.directions.directions import Blend, Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer
from ray_abliterate.recipe import Norm
from ray_abliterate.search.plan import Plan

PROJECTION_BUDGET_BYTES = 2 * 2**30
"""Products kept per model; writers beyond it (many experts) are multiplied anew in each trial."""


class Target(Protocol):
    """One writer, wherever its weights are."""

    @property
    def writer(self) -> Writer:
        """Its place in the model."""

    @property
    def gain(self) -> Tensor | None:
        """Effective weight of the norms after it, `"hidden"`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, hidden, fan-in."""

    @property
    def device(self) -> torch.device:
        """Where its products are computed."""

    def project(self, rows: Tensor, norm: Norm) -> ablation.Projections:
        """Products of its pristine weights with vectors, as `edit.project` gives them."""


T = TypeVar("T", bound=Target)


class Edits(Generic[T]):
    """What plans do to the writers of one model. Products with directions are computed once."""

    def __init__(
        self, targets: Sequence[T], remember: bool = True, always: Container[str] = ()
    ) -> None:
        """See the class.

        Args:
            targets: The writers, in the model's order.
            remember: Keep the products for the next plan, as far as they fit. What an edit comes
                out as, to the bit, does not depend on it.
            always: Parameters whose products are kept, fit or not: their weights are hard to read.
        """
        self._targets = targets
        self._remember, self._always = remember, always
        self._projections: dict[tuple[Norm, str], ablation.Projections] = {}
        self._kept: set[str] = set()
        self._directions: Directions | None = None

    def of(self, plan: Plan, directions: Directions) -> Iterator[tuple[T, ablation.Edit]]:
        """What a plan does to each writer that it does not leave alone."""
        for target, blends, strength in self.planned(plan, directions):
            yield target, self.edit(target, plan.norm, blends, strength)

    def planned(
        self, plan: Plan, directions: Directions
    ) -> Iterator[tuple[T, tuple[Blend, ...], float]]:
        """The writers that a plan edits, with their directions and strength. Reads no weights."""
        layers = directions.layers
        self._use(directions)
        strengths = {component: plan.strengths(component, layers) for component, _ in plan.profiles}
        for target in self._targets:
            writer = target.writer
            strength = strengths.get(writer.component, (0.0,) * layers)[writer.layer]
            own = directions.of(writer.component)
            if strength != 0 and (blends := own.used(plan, writer.layer)):
                yield target, blends, strength

    def _use(self, directions: Directions) -> None:
        """Forget the products of other directions."""
        if self._directions is not None and _same(self._directions, directions):
            return
        for target in self._targets:
            if target.writer.layer >= directions.layers:
                raise ModelError(
                    f"the directions are of a model with {directions.layers} layers, "
                    f"this one has a writer in layer {target.writer.layer}"
                )
        self._directions = directions
        self._projections.clear()
        self._kept.clear()
        spent = 0
        for target in self._targets:  # in order, so that no trial depends on earlier ones
            if target.writer.parameter in self._always:
                self._kept.add(target.writer.parameter)
                continue
            spent += self._estimate(target)
            if spent <= PROJECTION_BUDGET_BYTES:
                self._kept.add(target.writer.parameter)

    def edit(
        self, target: T, norm: Norm, blends: tuple[Blend, ...], strength: float
    ) -> ablation.Edit:
        """The edit of one writer, as `planned` describes it."""
        if target.writer.parameter not in self._kept:
            rows = list(dict.fromkeys(row for blend in blends for row, _ in blend))
            some = target.project(self._rows_of(target)[rows], norm)
            moved = [tuple((rows.index(row), weight) for row, weight in b) for b in blends]
            return ablation.edit(some, moved[0], strength, moved[1:])
        return ablation.edit(self._products(target, norm), blends[0], strength, blends[1:])

    def multiply(self, target: T, directions: Directions, norm: Norm) -> None:
        """Compute a writer's products now, not when the first plan needs them."""
        self._use(directions)
        self._products(target, norm)

    def _products(self, target: T, norm: Norm) -> ablation.Projections:
        key = (norm, target.writer.parameter)
        found = self._projections.get(key)
        if found is None:
            found = target.project(self._rows_of(target), norm)
        if self._remember:
            self._projections[key] = found
        return found

    def _rows_of(self, target: T) -> Tensor:
        """All directions as this writer sees them: pulled back through the norm after it."""
        assert self._directions is not None
        vectors = self._directions.of(target.writer.component).rows.to(target.device)
        return vectors if target.gain is None else vectors * target.gain.to(vectors.device)

    def _estimate(self, target: T) -> int:
        """Bytes of a writer's products, in the largest mode."""
        assert self._directions is not None
        experts, hidden, fan_in = target.shape
        rows = self._directions.of(target.writer.component).rows
        return 4 * len(rows) * experts * (fan_in + hidden)


def _same(one: Directions, other: Directions) -> bool:
    """Whether all edits come out the same."""
    if one.components.keys() != other.components.keys():
        return False
    return torch.equal(one.rows, other.rows) and all(
        torch.equal(own.rows, other.components[name].rows) for name, own in one.components.items()
    )
