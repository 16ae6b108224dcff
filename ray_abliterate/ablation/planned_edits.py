"""What plans do to the writers of a model: projections, computed once, and edits built from them.

Knows nothing about where weights are: in a model's memory (`ablation/weight_cache.py`), or in files
(`export/checkpoint_writers.py`).
"""

from collections.abc import Container, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ray_abliterate.ablation.edit import Edit, Projections, make_edit
from ray_abliterate.directions.directions import Blend, Directions
from ray_abliterate.errors import ModelError
from ray_abliterate.model.architecture import Writer
from ray_abliterate.recipe import Norm
from ray_abliterate.search.plan import Plan

PROJECTION_BUDGET_BYTES = 2 * 2**30
"""Projections stored per model; those of writers beyond it (many experts) are computed anew in each
trial."""


class EditTarget(Protocol):
    """One writer, wherever its weights are."""

    @property
    def writer(self) -> Writer:
        """The writer's place in the model."""

    @property
    def gain(self) -> Tensor | None:
        """The effective weight of the norms after the writer, `"hidden"`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of experts, the hidden size, and the fan-in."""

    @property
    def device(self) -> torch.device:
        """The device that its projections are computed on."""

    def project(self, rows: Tensor, norm: Norm) -> Projections:
        """Return the products of its pristine weights with vectors, `"row hidden"`."""


T = TypeVar("T", bound=EditTarget)


class PlannedEdits(Generic[T]):
    """What plans do to the writers of one model; projections are computed once."""

    def __init__(
        self, targets: Sequence[T], remember: bool = True, always: Container[str] = ()
    ) -> None:
        """
        Args:
            targets: The writers, in the model's order.
            remember: Store projections for the next plan, as far as they fit. The bits of an edit
                do not depend on it.
            always: Parameters whose projections are stored even beyond the budget, because their
                weights are expensive to read.
        """
        self._targets = targets
        self._remember, self._always = remember, always
        self._projections: dict[tuple[Norm, str], Projections] = {}
        self._stored: set[str] = set()
        self._directions: Directions | None = None

    def edits_of(self, plan: Plan, directions: Directions) -> Iterator[tuple[T, Edit]]:
        """Yield each writer that a plan edits, with its edit."""
        for target, blends, strength in self.edited_targets(plan, directions):
            yield target, self.make_edit(target, plan.norm, blends, strength)

    def edited_targets(
        self, plan: Plan, directions: Directions
    ) -> Iterator[tuple[T, tuple[Blend, ...], float]]:
        """Yield each writer that a plan edits, with its directions and strength; read no weights.

        Raises:
            ModelError: the directions are of a model with fewer layers.
        """
        layers = directions.layers
        self._use(directions)
        strengths = {component: plan.strengths(component, layers) for component, _ in plan.profiles}
        for target in self._targets:
            writer = target.writer
            strength = strengths.get(writer.component, (0.0,) * layers)[writer.layer]
            of_component = directions.for_component(writer.component)
            if strength != 0 and (blends := of_component.blends_for(plan, writer.layer)):
                yield target, blends, strength

    def make_edit(self, target: T, norm: Norm, blends: tuple[Blend, ...], strength: float) -> Edit:
        """Return the edit of one writer, with the blends and the strength of `edited_targets`."""
        if target.writer.parameter not in self._stored:
            # only the rows that are needed, numbered anew
            rows = list(dict.fromkeys(row for blend in blends for row, _ in blend))
            projections = target.project(self._rows_of(target)[rows], norm)
            blends = tuple(
                tuple((rows.index(row), weight) for row, weight in blend) for blend in blends
            )
            return make_edit(projections, blends[0], strength, blends[1:])
        return make_edit(self._project(target, norm), blends[0], strength, blends[1:])

    def precompute_projections(self, target: T, directions: Directions, norm: Norm) -> None:
        """Compute a writer's projections now, so that the first plan need not wait for them."""
        self._use(directions)
        self._project(target, norm)

    def _use(self, directions: Directions) -> None:
        """Drop the projections of other directions, and choose whose are stored."""
        if self._directions is not None and _give_same_edits(self._directions, directions):
            return
        for target in self._targets:
            if target.writer.layer >= directions.layers:
                raise ModelError(
                    f"the directions are of a model with {directions.layers} layers, but this one "
                    f"has a writer in layer {target.writer.layer}.\n"
                    "  Compute directions on this model, or load the model that they are of."
                )
        self._directions = directions
        self._projections.clear()
        self._stored.clear()
        spent = 0
        for target in self._targets:  # in order, so that no trial depends on earlier ones
            if target.writer.parameter in self._always:
                self._stored.add(target.writer.parameter)
                continue
            spent += self._projection_bytes(target)
            if spent <= PROJECTION_BUDGET_BYTES:
                self._stored.add(target.writer.parameter)

    def _project(self, target: T, norm: Norm) -> Projections:
        """Return the projections of a writer with all directions, stored ones if there are any."""
        key = (norm, target.writer.parameter)
        projections = self._projections.get(key)
        if projections is None:
            projections = target.project(self._rows_of(target), norm)
        if self._remember:
            self._projections[key] = projections
        return projections

    def _rows_of(self, target: T) -> Tensor:
        """Return all directions, `"row hidden"`, pulled back through the norm after a writer."""
        assert self._directions is not None
        vectors = self._directions.for_component(target.writer.component).rows.to(target.device)
        # the norm multiplies feature i by g_i, so <g ⊙ y, v> = <y, g ⊙ v>
        return vectors if target.gain is None else vectors * target.gain.to(vectors.device)

    def _projection_bytes(self, target: T) -> int:
        """Return the bytes of a writer's projections in the largest norm mode, `row`."""
        assert self._directions is not None
        experts, hidden, fan_in = target.shape
        rows = self._directions.for_component(target.writer.component).rows
        return 4 * len(rows) * experts * (fan_in + hidden)  # inner and outer, float32


def _give_same_edits(one: Directions, other: Directions) -> bool:
    """Return whether two sets of directions give the same edits under every plan."""
    if one.components.keys() != other.components.keys():
        return False
    return torch.equal(one.rows, other.rows) and all(
        torch.equal(directions.rows, other.components[name].rows)
        for name, directions in one.components.items()
    )
