"""Checks on the model itself what it can carry from pass to pass, on a short made-up text.

No family is trusted by its name: transformers 5.23 drops the state of some recurrent models when a
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
"""Tokens of the made-up text."""
SHARES = (0.27, 0.44, 0.02, 0.27)
"""Shares of the text that its passes get: after the first, one of several tokens, and one of a
single token."""
WINDOW = 5
"""Window of the check: shorter than each long pass, so that attention crosses the pass's edge."""
SLICE = 7
"""Positions whose logits are computed at a time."""
EXACT, HALF = 1e-3, 0.1
"""Differences that count as rounding, as shares of what forgetting the context changes: in float32,
and in half precision."""
FLOOR = 0.3
"""Nats that the limits are at least shares of: losses are of that size, and so is their
rounding."""
SINGLE = (
    "several tokens after the first pass give losses that differ from one full pass (the model's "
    "code drops their state); one token at a time is exact, and slow"
)


@dataclass(frozen=True)
class Capabilities:
    """What a model can carry from chunk to chunk.

    Attributes:
        cache_layers: The kinds of layers that its cache has.
        pass_limits: For each context it can carry, the tokens that a pass may have after the
            first one; 0 for any number.
        refused: For each context it cannot carry, the reason.
        notes: What else the user should know.
    """

    cache_layers: CacheLayers
    pass_limits: dict[CarriedContext, int]
    refused: dict[CarriedContext, str]
    notes: tuple[str, ...] = ()


def check_capabilities(runner: Runner, position_limit: int | None) -> Capabilities:
    """Check everything that a model could carry.

    Args:
        runner: The model; afterwards it has forgotten the check's text.
        position_limit: Positions that the model has, if there is a table of them.
    """
    count = min(TOKENS, position_limit or TOKENS) - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, runner.vocab, (count + 1,), generator=generator)
    try:
        if isinstance(runner, StatefulRunner):
            return _check_stateful(runner, ids)
        assert isinstance(runner, ModuleRunner)
        return _check_module(runner, ids)
    finally:
        runner.begin()


def _check_stateful(runner: StatefulRunner, ids: Tensor) -> Capabilities:
    """Check a model with a state of its own against its losses in a single call."""
    reference = _losses(runner, ids, [len(ids) - 1])
    pass_limit, why_not = _check_carrying(runner, ids, reference, EXACT)
    none = {CarriedContext.NONE: 0}
    no_cache = "the model carries a state of its own, not keys and values that could be bounded"
    refused = {CarriedContext.KV: no_cache, CarriedContext.WINDOW: no_cache}
    if why_not:
        refused = {**refused, CarriedContext.STATE: why_not}
        return Capabilities(CacheLayers(opaque=True), none, refused)
    pass_limits = {**none, CarriedContext.STATE: pass_limit}
    return Capabilities(CacheLayers(recurrent=1), pass_limits, refused)


def _check_module(runner: ModuleRunner, ids: Tensor) -> Capabilities:
    """Check a model of transformers; switch off what the runner can't do with it."""
    notes = []
    reference = _reference_losses(runner, ids)
    dtype = next(runner.module.parameters()).dtype
    limit = EXACT if dtype in (torch.float32, torch.float64) else HALF
    if no_cache := _why_no_cache(runner, ids):
        runner.cache_name = ""
    if runner.slices_logits and (why_not := _why_no_slices(runner, ids, reference, limit)):
        runner.slices_logits = False
        notes.append(f"logits exist for whole passes: {why_not}")
    if not runner.cache_name:
        runner.multi_pass = False
        refused = dict.fromkeys(_CARRYING, no_cache)
        pass_limits = {CarriedContext.NONE: 0}
        return Capabilities(CacheLayers(opaque=True), pass_limits, refused, tuple(notes))
    pass_limit, why_not = _check_carrying(runner, ids, reference, limit)
    layers = CacheLayers.of(runner.cache)
    pass_limits, refused = {CarriedContext.NONE: 0}, dict[CarriedContext, str]()
    exact, other = _exact_context(layers)
    if why_not:
        refused |= {CarriedContext.KV: why_not, CarriedContext.STATE: why_not}
        window_limit, no_window = 0, why_not
    else:
        pass_limits[exact] = pass_limit
        refused[other] = _why_not_exact(other, layers)
        window_limit, no_window = _check_window(runner, ids, reference, layers, pass_limit, limit)
    if no_window:
        refused[CarriedContext.WINDOW] = no_window
    else:
        pass_limits[CarriedContext.WINDOW] = window_limit
    return Capabilities(layers, pass_limits, refused, tuple(notes))


_CARRYING = (CarriedContext.KV, CarriedContext.WINDOW, CarriedContext.STATE)


def _exact_context(layers: CacheLayers) -> tuple[CarriedContext, CarriedContext]:
    """Return which of `kv` and `state` names a cache of such layers, and which does not."""
    recurrent = layers.recurrent and not layers.full
    if recurrent or layers.opaque:
        return CarriedContext.STATE, CarriedContext.KV
    return CarriedContext.KV, CarriedContext.STATE


def _why_not_exact(carry: CarriedContext, layers: CacheLayers) -> str:
    if carry is CarriedContext.KV:
        return "the model keeps a recurrent state; carry = state is the exact one"
    if layers.recurrent:
        return (
            f"{layers.full} of its layers have full attention, whose keys and values grow with the "
            "text; carry = kv is exact, carry = window takes constant memory"
        )
    return "the model has no recurrent state; carry = kv is the exact one"


def _reference_losses(runner: ModuleRunner, ids: Tensor) -> Tensor:
    """Return the losses of one plain forward pass, without anything of the runner's."""
    with torch.inference_mode():
        fed = ids[None, :-1].to(runner.device)
        logits = runner.module(input_ids=fed, use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits.cpu(), ids[1:], reduction="none")


def _why_no_cache(runner: ModuleRunner, ids: Tensor) -> str:
    """Return why the model can't remember anything of a text; empty if it can."""
    if not runner.cache_name:
        return "the model takes no cache"
    runner.begin()
    try:
        for part in torch.split(ids, _pass_sizes(len(ids))):
            runner.feed(part, ids[:0])
    except (*_MODEL_ERRORS, EvaluationError) as error:
        return first_line(error)
    return ""


def _why_no_slices(runner: ModuleRunner, ids: Tensor, reference: Tensor, limit: float) -> str:
    """Return why logits can't be made from slices of hidden states; empty if they can."""
    rows, runner.logit_rows = runner.logit_rows, SLICE
    try:
        sliced = _losses(runner, ids, [len(ids) - 1])
    except (*_MODEL_ERRORS, EvaluationError) as error:
        return first_line(error)
    finally:
        runner.logit_rows = rows
    equal = equal_but_for_rounding(sliced, reference, reference, limit)
    return "" if equal else "slices give other losses"


_MODEL_ERRORS = (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError)
"""What a model's code may raise when it is used in a way it was not made for."""


def _check_carrying(
    runner: Runner, ids: Tensor, reference: Tensor, limit: float
) -> tuple[int, str]:
    """Return how many tokens a pass may have after the first, or why nothing can be carried.

    0 stands for any number of tokens.
    """
    sizes = _pass_sizes(len(ids) - 1)
    effect = _losses_without_context(runner, ids, sizes) - reference
    why_not, equal = _compare(
        lambda: _losses_with_rollback(runner, ids, sizes), reference, effect, limit
    )
    if equal:
        return 0, ""
    one_by_one = [1] * (len(ids) - 1)
    _, equal = _compare(lambda: _losses(runner, ids, one_by_one), reference, effect, limit)
    if equal:
        return 1, ""
    return 0, why_not or "passes in a row give other losses than one full pass"


def _check_window(
    runner: ModuleRunner,
    ids: Tensor,
    reference: Tensor,
    layers: CacheLayers,
    pass_limit: int,
    limit: float,
) -> tuple[int, str]:
    """Check a bounded window as `_check_carrying` does.

    The text is compared with itself token by token, where no mask is needed: the cache alone bounds
    what a token sees.
    """
    if layers.opaque or not (layers.full or layers.bounded):
        return 0, "the model has no attention; carry = state is exact and takes constant memory"
    runner.window = WINDOW
    try:
        single = _losses(runner, ids, [1] * (len(ids) - 1))
        if pass_limit == 1:
            return 1, ""
        # recurrent models have separate code for single tokens, which is a little off in some
        window_limit = HALF if layers.recurrent else limit
        sizes = _pass_sizes(len(ids) - 1)
        why_not, equal = _compare(
            lambda: _losses_with_rollback(runner, ids, sizes),
            single,
            single - reference,
            window_limit,
        )
    except _MODEL_ERRORS as error:
        return 0, f"its cache can't be bounded ({first_line(error)})"
    finally:
        runner.window = None
        runner.begin()
    return 0, "" if equal else why_not or "its attention does not heed the window"


def can_begin_at(runner: ModuleRunner, layer: int) -> bool:
    """Return whether passes that begin at a block give the same losses to the last bit.

    The context that is set on the runner is the one that is checked.

    Args:
        runner: The model; afterwards it has forgotten the check's text.
        layer: The block.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, runner.vocab, (TOKENS,), generator=generator)
    sizes = _pass_sizes(TOKENS - 1) if runner.multi_pass else [TOKENS - 1]
    outputs: list[Any] = []
    handle = runner.blocks[layer - 1].register_forward_hook(lambda _m, _a, out: outputs.append(out))
    runner.start_block, runner.recorded_blocks = 0, (layer,)
    try:
        reference, states = _losses_and_inputs(runner, ids, sizes, None)
        runner.blocks_return_tuples = isinstance(outputs[0], tuple)
        runner.start_block, runner.recorded_blocks = layer, ()
        return torch.equal(reference, _losses_and_inputs(runner, ids, sizes, states)[0])
    except (*_MODEL_ERRORS, EvaluationError):
        return False
    finally:
        handle.remove()
        runner.start_block, runner.recorded_blocks, runner.start_states = 0, (), None
        runner.begin()


def _losses_and_inputs(
    runner: ModuleRunner, ids: Tensor, sizes: Sequence[int], states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the losses of a text, and the recorded inputs of a block, `"token hidden"`.

    Passes begin at the runner's block if its inputs `states` are given.
    """
    runner.begin()
    losses, inputs, at = [], [], 0
    for size in sizes:
        runner.start_states = None if states is None else states[at : at + size]
        losses.append(runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1]))
        inputs += [recorded[0] for recorded in runner.block_inputs.values()]
        at += size
    return torch.cat(losses), torch.cat(inputs) if inputs else torch.empty(0)


def _compare(
    measure: Callable[[], Tensor], reference: Tensor, effect: Tensor, limit: float
) -> tuple[str, bool]:
    """Return what the model raised, if anything, and whether its losses equal the reference."""
    try:
        return "", equal_but_for_rounding(measure(), reference, effect, limit)
    except _MODEL_ERRORS as error:
        return first_line(error), False


def equal_but_for_rounding(losses: Tensor, reference: Tensor, effect: Tensor, limit: float) -> bool:
    """Return whether two tensors of losses are equal but for rounding.

    Their root mean square difference is compared with `limit` times that of `effect`, which is what
    forgetting the context changes. Where context hardly matters to a model, a quarter of the effect
    may be rounding, up to `FLOOR * limit` nats.
    """
    difference, whole = (float(x.square().mean().sqrt()) for x in (losses - reference, effect))
    return difference <= max(limit * whole, min(FLOOR * limit, whole / 4))


def _pass_sizes(count: int) -> list[int]:
    """Return the sizes of four passes over `count` tokens, as `SHARES` says."""
    sizes = [max(1, int(share * count)) for share in SHARES[:-1]]
    return [*sizes, count - sum(sizes)]


def _losses(runner: Runner, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the losses of a text that is fed in passes of these sizes."""
    runner.begin()
    losses, at = [], 0
    for size in sizes:
        losses.append(runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1]))
        at += size
    return torch.cat(losses)


def _losses_with_rollback(runner: Runner, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the same, with each pass undone and run again, so that restoring is checked too."""
    runner.begin()
    losses, at = [], 0
    for size in sizes:
        snapshot = runner.snapshot()
        for _ in range(2):
            runner.restore(snapshot)
            of_pass = runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1])
        losses.append(of_pass)
        at += size
    return torch.cat(losses)


def _losses_without_context(runner: Runner, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the same, with everything forgotten before each pass."""
    losses, at = [], 0
    for size in sizes:
        runner.begin()
        losses.append(runner.feed(ids[at : at + size], ids[at + 1 : at + size + 1]))
        at += size
    return torch.cat(losses)
