"""Directions: unit vectors in the residual stream that a behaviour lies along, layer by layer.

They are a value, which knows nothing about models, or how it was computed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.data.safetensors_header import parse_header
from ray_abliterate.directions.residuals.residual_set import LayerVectors
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.search.plan import Plan

Blend = tuple[tuple[int, float], ...]
"""Numbers of rows and their weights, whose sum points along a direction."""
VANISHING = 1e-6
"""Below this share of its length, what is left of a vector is rounding."""


class NoDirection(PromptSourceError, ValueError):
    """Raised where the two sets leave the same residuals, so that no layer has a direction."""


@dataclass(frozen=True)
class Directions:
    """A unit vector per layer, float32 `"layer hidden"`; zeros where a layer has none.

    Attributes:
        vectors: The directions; where a layer has several, the first of each.
        method: Name of the method that found them.
        origin: Fingerprints of the two prompt sets, and what else they came from.
        further: The other directions of each layer, orthonormal with the first; zeros where a
            layer has fewer than others.
        spared: Unit vectors that directions used at a layer are made orthogonal to there, wherever
            they were found: the mean of the neutral prompts at that layer.
        components: By component, directions found in what it adds to the stream, for its writers;
            components without an entry are edited with the stream's directions.
    """

    vectors: LayerVectors
    method: str
    origin: Mapping[str, str]
    further: Float[Tensor, "layer further hidden"] | None = None
    spared: LayerVectors | None = None
    components: Mapping[str, "Directions"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        norms = self.vectors.double().norm(dim=-1)
        wrong = ((norms - 1).abs() > 1e-5) & (norms != 0)
        if wrong.any():
            layer = int(wrong.nonzero()[0])
            raise ValueError(f"the direction of layer {layer} has length {norms[layer]:.6f}, not 1")
        if not (norms > 0).any():
            raise NoDirection(
                "no layer has a direction: the two prompt sets leave the same residuals.\n"
                "  Check that prompts.behaviour and prompts.neutral are different prompts."
            )
        if self.further is not None:
            self._refuse_oblique()

    def _refuse_oblique(self) -> None:
        basis = self.basis.double()
        products = basis @ basis.mT
        exists = basis.any(dim=-1).double()  # (layer, rank): a row of zeros is no direction
        wrong = (products - torch.diag_embed(exists)).abs().amax(dim=(1, 2)) > 1e-5
        if wrong.any():
            layer = int(wrong.nonzero()[0])
            raise ValueError(f"the directions of layer {layer} are not orthonormal")

    @property
    def layers(self) -> int:
        """The number of layers, with and without a direction."""
        return self.vectors.shape[0]

    @property
    def rank(self) -> int:
        """The most directions that a layer has."""
        return 1 + (0 if self.further is None else self.further.shape[1])

    @property
    def basis(self) -> Float[Tensor, "layer rank hidden"]:
        """All directions of each layer."""
        lead = self.vectors[:, None]
        return lead if self.further is None else torch.cat([lead, self.further], dim=1)

    @cached_property
    def rows(self) -> Float[Tensor, "row hidden"]:
        """The rows that blends number: first directions, further directions, spared vectors."""
        parts = [self.vectors]
        if self.further is not None:
            parts.append(self.further.flatten(0, 1))
        if self.spared is not None:
            parts.append(self.spared)
        return torch.cat(parts) if len(parts) > 1 else self.vectors

    def for_component(self, component: str) -> "Directions":
        """Return the directions that a component's writers are edited with."""
        return self.components.get(component, self)

    def bits(self) -> bytes:
        """Return the bytes of all vectors that edits are made of, to hash or compare."""
        stream = bytes(self.rows.numpy().tobytes())
        parts = [name.encode() + self.components[name].bits() for name in sorted(self.components)]
        return b"".join([stream, *parts])

    def with_components(self, components: Mapping[str, "Directions"]) -> "Directions":
        """Return a copy with directions for the components' own writers."""
        return replace(self, components=dict(components))

    @cached_property
    def usable(self) -> tuple[bool, ...]:
        """Whether each layer has a direction."""
        return tuple(bool(row.any()) for row in self.vectors)

    def blend(self, layer: float) -> Blend:
        """Return rows and weights whose sum is the direction at a (fractional) layer.

        One row, or the two neighbours: `(1 - f) v_low ± f v_high`, the sign chosen so that they
        don't cancel, scaled to unit length. A neighbour without a direction is left out; if both
        have none, the nearest layer that has one takes their place.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= layer <= self.layers - 1:
            raise ValueError(f"layer {layer} is outside 0 to {self.layers - 1}")
        low, share = math.floor(layer), layer - math.floor(layer)
        parts = [(low, 1 - share), (low + 1, share)] if share else [(low, 1.0)]
        usable = self.usable
        parts = [(row, weight) for row, weight in parts if usable[row]]
        if not parts:
            rows = [row for row, has in enumerate(usable) if has]
            return ((min(rows, key=lambda row: abs(row - layer)), 1.0),)
        if len(parts) == 1:
            return ((parts[0][0], 1.0),)
        (a, weight_a), (b, weight_b) = parts
        # unit vectors: their weighted sum has length² w_a² + w_b² + 2 w_a w_b cos
        cosine = float(self.vectors[a].double() @ self.vectors[b].double())
        if cosine < 0:
            cosine, weight_b = -cosine, -weight_b
        norm = math.sqrt(weight_a**2 + weight_b**2 + 2 * weight_a * abs(weight_b) * cosine)
        return (a, weight_a / norm), (b, weight_b / norm)

    def blends_for(self, plan: Plan, layer: int) -> tuple[Blend, ...]:
        """Return the blends that a plan takes out of a layer's writers; possibly none."""
        last = self.layers - 1.0
        if plan.scope == "global":
            return self.blends(min(plan.direction_layer, last), layer)
        if plan.source_offset is None:
            return self.blends(float(layer), layer) if self.usable[layer] else ()
        return self.blends(min(max(layer + plan.source_offset, 0.0), last), layer)

    def blends(self, layer: float, target: int | None = None) -> tuple[Blend, ...]:
        """Return rows and weights of all directions at a (fractional) layer, numbered as in `rows`.

        Where there is one direction, that is `blend`. Of several, the bases of the two neighbours
        are rotated towards each other as far as possible (orthogonal Procrustes), and blended
        vector by vector; the result is a basis, but not an orthonormal one.

        Args:
            layer: The layer that the directions are taken from.
            target: The layer where they are used; what is spared there is projected out of them.
        """
        lead = self.blend(layer)
        blends = (lead,) if self.rank == 1 else self._blended_bases(lead)
        if target is None or self.spared is None:
            return blends
        return tuple(self._sparing(blend, target) for blend in blends)

    def _blended_bases(self, lead: Blend) -> tuple[Blend, ...]:
        """Return blends of several directions at the layers that the first one's blend names."""
        basis = self.basis.double()
        rotation = torch.eye(self.rank, dtype=torch.float64)
        (low, share), (high, rest) = lead if len(lead) == 2 else (lead[0], (lead[0][0], 0.0))
        if rest:
            left, _, right = torch.linalg.svd(basis[low] @ basis[high].T)
            rotation = left @ right  # (rank, rank)
        blends = []
        for number in range(self.rank):
            of_low = [(self._row(low, number), share)] if basis[low, number].any() else []
            of_high = [
                (self._row(high, j), abs(rest) * float(rotation[number, j]))
                for j in range(self.rank)
                if rest and basis[high, j].any()
            ]
            if of_low or of_high:
                blends.append((*of_low, *of_high))
        return tuple(blends)

    def _row(self, layer: int, number: int) -> int:
        """Return the number of a layer's direction in `rows`."""
        return layer if number == 0 else self.layers + layer * (self.rank - 1) + number - 1

    def _sparing(self, blend: Blend, target: int) -> Blend:
        """Project what a layer spares out of a blend, unless nothing else would be left of it."""
        assert self.spared is not None
        rows, spared = self.rows, self.spared[target].double()
        parts = [weight * rows[row].double() for row, weight in blend]
        vector = torch.stack(parts).sum(dim=0)
        along = float(vector @ spared)
        if not along or (vector - along * spared).norm() <= VANISHING * vector.norm():
            return blend
        return (*blend, (self.layers * self.rank + target, -along))

    def at(self, layer: float) -> Float[Tensor, " hidden"]:
        """Return the unit direction at a layer, which may lie between two."""
        parts = [weight * self.vectors[row].double() for row, weight in self.blend(layer)]
        total = torch.stack(parts).sum(dim=0)
        return torch.nn.functional.normalize(total, dim=0).float()

    def with_position(self, position: int) -> "Directions":
        """Return a copy that records the token it was found at; -1 is the last of a prompt."""
        return replace(self, origin={**self.origin, "position": str(position)})

    def to_bytes(self) -> bytes:
        """Serialise the directions as a safetensors file, whose metadata are method and origin."""
        from safetensors.torch import save

        facts = {"method": self.method, "origin": json.dumps(dict(self.origin), sort_keys=True)}
        tensors = self._tensors()
        for name, part in self.components.items():
            tensors |= {f"{name}/{kind}": tensor for kind, tensor in part._tensors().items()}
        return save(tensors, metadata=facts)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"directions": self.vectors, "further": self.further, "spared": self.spared}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def from_bytes(cls, data: bytes) -> "Directions":
        """Parse `to_bytes`' output, bit for bit."""
        from safetensors.torch import load

        facts = parse_header(data).metadata
        tensors, origin = load(data), json.loads(facts["origin"])
        names = sorted({name.rpartition("/")[0] for name in tensors})  # "" is the stream's own

        def part(name: str) -> Directions:
            prefix = f"{name}/" if name else ""
            further, spared = tensors.get(f"{prefix}further"), tensors.get(f"{prefix}spared")
            return cls(tensors[f"{prefix}directions"], facts["method"], origin, further, spared)

        return part("").with_components({name: part(name) for name in names if name})
