"""The points at which both programs are compared, as our plans and as the peer's parameters.

Both search spaces describe the same tents over layers. Names, and where a fraction is taken,
differ:

| here                          | the peer's                                            |
|-------------------------------|-------------------------------------------------------|
| `attn`, `mlp`                 | `attn.o_proj`, `mlp.down_proj`                        |
| `peak`, `peak_layer`, `reach` | `max_weight`, `max_weight_position`, `min_weight_distance` |
| `floor`, a share of the peak  | `min_weight` = floor x peak                           |
| `direction_layer`, scope `global` | `direction_index`; it adds 1, its row 0 being the embeddings |
| scope `per-layer`             | `direction_index` = None                              |
| norm `row`, exact             | `full`, its default: a rank-3 approximation of the same edit |
| norm `none`                   | `none`                                                |

The peer's `pre` has no counterpart here, our `column` none there.
"""

import random
from typing import Any

from ray_abliterate.recipe import ComponentSpace, Norm, SpaceSettings
from ray_abliterate.search.plan import ModelShape, Plan
from ray_abliterate.search.space import CategoricalRange, SearchSpace

COMPONENTS = {"attn": "attn.o_proj", "mlp": "mlp.down_proj"}
"""Components of a dense model: the peer's names by ours."""
NORMALISATION: dict[Norm, str] = {"none": "none", "row": "full"}
PEER_PEAK = (0.8, 1.5)
"""The peer's bounds of the peak, for every component; ours let `mlp` be switched off."""


def draw(shape: ModelShape, norm: Norm, count: int, seed: int) -> list[Plan]:
    """Draw points uniformly from the peer's default space: ours, with its bounds of the peak.

    The first points do not depend on how many are drawn.
    """
    components = {"mlp": ComponentSpace(peak=PEER_PEAK)}
    space = SearchSpace.of(shape, SpaceSettings(peak=PEER_PEAK, components=components), norm)
    generator = random.Random(seed)
    return [space.plan(_draw(space, generator)) for _ in range(count)]


def _draw(space: SearchSpace, generator: random.Random) -> dict[str, Any]:
    return {
        name: generator.choice(domain.options)
        if isinstance(domain, CategoricalRange)
        else generator.uniform(domain.low, domain.high)
        for name, domain in space.parameters
    }


def to_peer(plan: Plan) -> dict[str, Any]:
    """Return the peer's direction index and parameters that make the same edit.

    Raises:
        ValueError: The peer has no such component.
    """
    missing = [c for c, _ in plan.profiles if c not in COMPONENTS]
    if missing:
        raise ValueError(f"the peer has no counterpart of {missing}; known: {list(COMPONENTS)}")
    return {
        "direction_index": plan.direction_layer if plan.scope == "global" else None,
        "parameters": {
            COMPONENTS[component]: {
                "max_weight": profile.peak,
                "max_weight_position": profile.peak_layer,
                "min_weight": profile.floor * profile.peak,
                "min_weight_distance": profile.reach,
            }
            for component, profile in plan.profiles
        },
    }
