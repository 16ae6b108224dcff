"""Asks a model itself, on a short made-up text, what it carries from pass to pass, and how well.

No family is believed by its name: transformers 5.23 drops the state of some recurrent models when a
pass after the first has more than one token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.data.hub import first_line
from ray_abliterate.errors import EvaluationError
from ray_abliterate.evaluation.streaming.cache_state import CacheLayers
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.runners import ModuleRunner, Runner, StatefulRunner

TOKENS = 32
SHARES = (0.27, 0.44, 0.02, 0.27)
"""Parts of the text that the passes get: several tokens after the first, and a single one."""
WINDOW = 5
"""Of the check; shorter than each long part, so that a pass reaches over its own edge."""
SLICE = 7
"""Positions whose logits are computed at a time."""
EXACT, HALF = 1e-3, 0.1
"""Limits, as shares of what forgetting changes, in float32 and in half precision."""
FLOOR = 0.3
"""Nats that these are shares of at least: losses are of that size, and so is their rounding."""
SINGLE = (
    "several tokens after the first pass give other losses than one full pass (their state is "
    "dropped by the model's code); one token at a time is right, and slow"
)


@dataclass(frozen=True)
class Capabilities:
    """What a model can carry.

    Attributes:
        memory: What its cache is made of.
        per_pass: By carry: tokens a pass may have after the first one; 0 for any number.
        refused: By carry: why it can't be.
        notes: What else was found.
    """

    memory: CacheLayers
    per_pass: dict[CarriedContext, int]
    refused: dict[CarriedContext, str]
    notes: tuple[str, ...] = ()

    @property
    def constant(self) -> bool:
        """Whether what it keeps of a text has a size of its own, whatever the text's."""
        return CarriedContext.STATE in self.per_pass or not (self.memory.full or self.memory.opaque)


def check_capabilities(runner: Runner, reach: int | None) -> Capabilities:
    """Check everything that a model could carry.

    Args:
        runner: The model; left as if it had seen nothing.
        reach: Positions that it has, if there is a table of them.
    """
    count = min(TOKENS, reach or TOKENS) - 1
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, runner.vocab, (count + 1,), generator=draw)
    try:
        if isinstance(runner, StatefulRunner):
            return _stateful(runner, ids)
        assert isinstance(runner, ModuleRunner)
        return _module(runner, ids)
    finally:
        runner.begin()


def _stateful(runner: StatefulRunner, ids: Tensor) -> Capabilities:
    """A state of the model's own: its one-call losses are what it is held to."""
    full = _read(runner, ids, [len(ids) - 1])
    per_pass, why = _carrying(runner, ids, full, EXACT)
    none = {CarriedContext.NONE: 0}
    kept = "the model carries a state of its own, not keys and values that could be bounded"
    refused = {CarriedContext.KV: kept, CarriedContext.WINDOW: kept}
    if why:
        return Capabilities(CacheLayers(opaque=True), none, {**refused, CarriedContext.STATE: why})
    return Capabilities(CacheLayers(recurrent=1), {**none, CarriedContext.STATE: per_pass}, refused)


def _module(runner: ModuleRunner, ids: Tensor) -> Capabilities:
    notes = []
    full = _full(runner, ids)
    dtype = next(runner.module.parameters()).dtype
    limit = EXACT if dtype in (torch.float32, torch.float64) else HALF
    if missing := _no_cache(runner, ids):
        runner.cache_name = ""
    if runner.head_slices and (why := _wrong_head(runner, ids, full, limit)):
        runner.head_slices = False
        notes.append(f"logits exist for whole passes: {why}")
    if not runner.cache_name:
        runner.splits = False
        refused = dict.fromkeys(_CARRIED, missing)
        return Capabilities(
            CacheLayers(opaque=True), {CarriedContext.NONE: 0}, refused, tuple(notes)
        )
    per_pass, why = _carrying(runner, ids, full, limit)
    memory = CacheLayers.of(runner.cache)
    able, refused = {CarriedContext.NONE: 0}, dict[CarriedContext, str]()
    own, other = _names(memory)
    if why:
        refused |= {CarriedContext.KV: why, CarriedContext.STATE: why}
    else:
        able[own] = per_pass
        refused[other] = _not_its_kind(other, memory)
    window, no_window = (0, why) if why else _windowed(runner, ids, full, memory, per_pass, limit)
    if no_window:
        refused[CarriedContext.WINDOW] = no_window
    else:
        able[CarriedContext.WINDOW] = window
    return Capabilities(memory, able, refused, tuple(notes))


_CARRIED = (CarriedContext.KV, CarriedContext.WINDOW, CarriedContext.STATE)


def _names(memory: CacheLayers) -> tuple[CarriedContext, CarriedContext]:
    """What the cache of such a model is called, and what it is not."""
    states = memory.recurrent and not memory.full
    return (
        (CarriedContext.STATE, CarriedContext.KV)
        if states or memory.opaque
        else (CarriedContext.KV, CarriedContext.STATE)
    )


def _not_its_kind(carry: CarriedContext, memory: CacheLayers) -> str:
    if carry is CarriedContext.KV:
        return "the model keeps a recurrent state; carry = state is the exact one"
    if memory.recurrent:
        return (
            f"{memory.full} of its layers have full attention, whose keys and values grow with the "
            "text; carry = kv is exact, carry = window constant"
        )
    return "the model has no recurrent state; carry = kv is the exact one"


def _full(runner: ModuleRunner, ids: Tensor) -> Tensor:
    """Losses of one plain forward pass, without any of our ways."""
    with torch.inference_mode():
        fed = ids[None, :-1].to(runner.device)
        logits = runner.module(input_ids=fed, use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits.cpu(), ids[1:], reduction="none")


def _no_cache(runner: ModuleRunner, ids: Tensor) -> str:
    """Why nothing of a text can be kept; empty if it can."""
    if not runner.cache_name:
        return "the model takes no cache"
    runner.begin()
    try:
        for part in torch.split(ids, _parts(len(ids))):
            runner.feed(part, ids[:0])
    except (*_ANY, EvaluationError) as error:
        return first_line(error)
    return ""


def _wrong_head(runner: ModuleRunner, ids: Tensor, full: Tensor, limit: float) -> str:
    """Why logits can't be made from slices of hidden states; empty if they can."""
    rows, runner.rows = runner.rows, SLICE
    try:
        sliced = _read(runner, ids, [len(ids) - 1])
    except (*_ANY, EvaluationError) as error:
        return first_line(error)
    finally:
        runner.rows = rows
    return "" if same(sliced, full, full, limit) else "slices give other losses"


_ANY = (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError)
"""What a model's code may raise when it is asked for what it was not made for."""


def _carrying(runner: Runner, ids: Tensor, full: Tensor, limit: float) -> tuple[int, str]:
    """Tokens that a pass may have after the first, 0 for any number; or why nothing is carried."""
    parts = _parts(len(ids) - 1)
    effect = _apart(runner, ids, parts) - full
    why, right = _try(lambda: _rolled_back(runner, ids, parts), full, effect, limit)
    if right:
        return 0, ""
    _, right = _try(lambda: _read(runner, ids, [1] * (len(ids) - 1)), full, effect, limit)
    return (1, "") if right else (0, why or "passes in a row give other losses than one full pass")


def _windowed(
    runner: ModuleRunner,
    ids: Tensor,
    full: Tensor,
    memory: CacheLayers,
    per_pass: int,
    limit: float,
) -> tuple[int, str]:
    """The same for a bounded window, held to token by token, where no mask is needed."""
    if memory.opaque or not (memory.full or memory.bounded):
        return 0, "the model has no attention; carry = state is exact and constant"
    runner.window = WINDOW
    try:
        single = _read(runner, ids, [1] * (len(ids) - 1))
        if per_pass == 1:
            return 1, ""
        # single tokens have code of their own in recurrent models, a little off in some
        wanted = HALF if memory.recurrent else limit
        parts = _parts(len(ids) - 1)
        why, right = _try(lambda: _rolled_back(runner, ids, parts), single, single - full, wanted)
    except _ANY as error:
        return 0, f"its cache can't be bounded ({first_line(error)})"
    finally:
        runner.window = None
        runner.begin()
    return 0, "" if right else why or "its attention does not heed the window"


def can_begin_at(runner: ModuleRunner, layer: int) -> bool:
    """Whether passes that begin at a block give the same to the last bit; in the carry that is set.

    Args:
        runner: The model; left as if it had seen nothing.
        layer: The block.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, runner.vocab, (TOKENS,), generator=draw)
    sizes = _parts(TOKENS - 1) if runner.splits else [TOKENS - 1]
    answers: list[Any] = []
    handle = runner.blocks[layer - 1].register_forward_hook(lambda _m, _a, out: answers.append(out))
    runner.start, runner.record = 0, (layer,)
    try:
        whole, states = _begun(runner, ids, sizes, layer, None)
        runner.in_tuples = isinstance(answers[0], tuple)
        runner.start, runner.record = layer, ()
        return torch.equal(whole, _begun(runner, ids, sizes, layer, states)[0])
    except (*_ANY, EvaluationError):
        return False
    finally:
        handle.remove()
        runner.start, runner.record, runner.states = 0, (), None
        runner.begin()


def _begun(
    runner: ModuleRunner, ids: Tensor, parts: Sequence[int], layer: int, states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses, and the inputs of a block; in passes that begin there if they are given."""
    runner.begin()
    found, inputs, at = [], [], 0
    for size in parts:
        runner.states = None if states is None else states[at : at + size]
        found.append(runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1]))
        inputs += [own[0] for own in runner.inputs.values()]
        at += size
    return torch.cat(found), torch.cat(inputs) if inputs else torch.empty(0)


def _try(
    read: Callable[[], Tensor], wanted: Tensor, effect: Tensor, limit: float
) -> tuple[str, bool]:
    """What went wrong, if something was raised; whether the losses are those that are wanted."""
    try:
        return "", same(read(), wanted, effect, limit)
    except _ANY as error:
        return first_line(error), False


def same(found: Tensor, wanted: Tensor, effect: Tensor, limit: float) -> bool:
    """Equal but for rounding: root mean square against what forgetting the context changes; a
    model that context hardly matters to may differ by a quarter of that, up to `FLOOR`."""
    away, whole = (float(x.square().mean().sqrt()) for x in (found - wanted, effect))
    return away <= max(limit * whole, min(FLOOR * limit, whole / 4))


def _parts(count: int) -> list[int]:
    sizes = [max(1, int(share * count)) for share in SHARES[:-1]]
    return [*sizes, count - sum(sizes)]


def _read(runner: Runner, ids: Tensor, parts: Sequence[int]) -> Tensor:
    """Losses of a text that comes in passes of these sizes."""
    runner.begin()
    found, at = [], 0
    for size in parts:
        found.append(runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1]))
        at += size
    return torch.cat(found)


def _rolled_back(runner: Runner, ids: Tensor, parts: Sequence[int]) -> Tensor:
    """The same, each pass done twice: what comes back must be what was there."""
    runner.begin()
    found, at = [], 0
    for size in parts:
        kept = runner.snapshot()
        for _ in range(2):
            runner.restore(kept)
            losses = runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1])
        found.append(losses)
        at += size
    return torch.cat(found)


def _apart(runner: Runner, ids: Tensor, parts: Sequence[int]) -> Tensor:
    """The same, with everything forgotten before each pass."""
    found, at = [], 0
    for size in parts:
        runner.begin()
        found.append(runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1]))
        at += size
    return torch.cat(found)
