"""The contract of the architecture table, for every family and for a plug-in's own rows.

The closure check settles a table: take a direction out of the first block's input and out of all
that the writers write, at full strength. If the table is complete, and every axis, bias and norm in
it is right, then no block's output has anything left along the direction.

    class TestMyFamily(ArchitectureContract):
        rows = (WriterRow(r"attention\\.out\\.weight", "attn"), ...)

        @pytest.fixture
        def model(self):
            return randomised(MyModel(my_tiny_config))
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.model.architecture import (
    Writer,
    WriterRow,
    find_blocks,
    find_writers,
    hidden_size,
    oriented,
    post_norm_gain,
    text_config,
)
from ray_abliterate.recipe import COMPONENT_NAMES
from ray_abliterate.testing.tiny import TINY_FAMILIES, randomised, tiny_config, tiny_model

__all__ = [
    "MOST_LEAK",
    "NOTICEABLE_LEAK",
    "TINY_FAMILIES",
    "ArchitectureContract",
    "ablate_writers",
    "measure_leak",
    "random_direction",
    "randomised",
    "tiny_config",
    "tiny_model",
]

MOST_LEAK = 1e-5
"""A complete table leaks less than this, in float32."""
NOTICEABLE_LEAK = 1e-3
"""A broken table leaks more than this."""


def random_direction(model: nn.Module, seed: int = 0) -> Float[Tensor, "hidden"]:
    """Return a random unit vector in the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(hidden_size(model), generator=generator)
    return nn.functional.normalize(direction, dim=0)


@contextmanager
def ablate_writers(
    model: nn.Module, writers: Sequence[Writer], direction: Float[Tensor, "hidden"]
) -> Iterator[None]:
    """Take `direction` out of all `writers` at full strength, in place, until the block ends."""
    names = {name for writer in writers for name in (writer.parameter, writer.bias) if name}
    pristine = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        for writer in writers:
            _ablate(model, writer, direction)
        yield
    finally:
        with torch.no_grad():
            for name, values in pristine.items():
                model.get_parameter(name).copy_(values)


@torch.no_grad()
def _ablate(model: nn.Module, writer: Writer, direction: Tensor) -> None:
    # the norm multiplies feature i by g_i, so <g ⊙ y, v> = <y, g ⊙ v>
    gain = post_norm_gain(model, writer)
    pulled = direction if gain is None else gain * direction
    pulled = nn.functional.normalize(pulled, dim=0)
    weight = oriented(model.get_parameter(writer.parameter), writer)  # (expert, hidden, fan_in)
    weight.sub_(torch.einsum("h,g,egf->ehf", pulled, pulled, weight))
    if writer.bias is not None:
        bias = model.get_parameter(writer.bias)
        bias.sub_((bias @ pulled).unsqueeze(-1) * pulled)


@torch.no_grad()
def measure_leak(
    model: nn.Module,
    writers: Sequence[Writer],
    direction: Float[Tensor, "hidden"] | None = None,
    *,
    tokens: int = 12,
    seed: int = 0,
) -> float:
    """Return what is left of a direction in the stream when `writers` no longer write it.

    Args:
        model: A small model in float32; its weights are restored afterwards.
        writers: The writers to edit at full strength.
        direction: Unit vector; None draws one from `seed`.
        tokens: Length of each of two random prompts.
        seed: Draws the direction and the prompts.

    Returns:
        The greatest |vᵀx| / ‖x‖ over the outputs x of all blocks at all positions.
    """
    chosen = random_direction(model, seed) if direction is None else direction
    generator = torch.Generator().manual_seed(seed)
    vocab = int(text_config(model).vocab_size)
    prompts = torch.randint(3, vocab, (2, tokens), generator=generator)
    leaks: list[float] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_projected_out(args[0], chosen), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _projected_out(kwargs["hidden_states"], chosen)}

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        leaks.append(float(((hidden @ chosen).abs() / hidden.norm(dim=-1)).max()))

    _, blocks = find_blocks(model)
    with ExitStack() as stack:
        stack.enter_context(ablate_writers(model, writers, chosen))
        first = blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
        stack.callback(first.remove)
        for block in blocks:
            stack.callback(block.register_forward_hook(leave).remove)
        model(input_ids=prompts, use_cache=False)
    if len(leaks) < len(blocks):
        raise AssertionError(f"only {len(leaks)} of {len(blocks)} blocks ran")
    return max(leaks)


def _projected_out(hidden: Tensor, direction: Tensor) -> Tensor:
    return hidden - (hidden @ direction).unsqueeze(-1) * direction


class ArchitectureContract:
    """What must hold for the rows of a family. A subclass defines the fixture `model`.

    Attributes:
        rows: Rows of your own that come before the table's.
    """

    rows: Sequence[WriterRow] = ()

    @pytest.fixture
    def model(self) -> nn.Module:
        """Return a small random model in float32; see `randomised`."""
        raise NotImplementedError("define the fixture `model`")

    def test_no_direction_is_left_in_the_stream_when_all_writers_are_ablated(
        self, model: nn.Module
    ) -> None:
        """Every block's output has nothing along a direction that no writer writes."""
        writers = find_writers(model, self.rows)
        assert measure_leak(model, writers) < MOST_LEAK
        assert measure_leak(model, writers, seed=1) < MOST_LEAK

    def test_a_forgotten_component_or_row_is_noticed(self, model: nn.Module) -> None:
        """The direction comes back when any one component is left out, or any one name."""
        writers = find_writers(model, self.rows)
        prefix, _ = find_blocks(model)
        without_one = {
            tuple(writer for writer in writers if kind(writer) != forgotten): forgotten
            for kind in (_component, partial(_within_block, prefix))
            for forgotten in {kind(writer) for writer in writers}
        }
        for rest, forgotten in without_one.items():
            assert measure_leak(model, rest) > NOTICEABLE_LEAK, forgotten

    def test_a_wrong_axis_is_noticed(self, model: nn.Module) -> None:
        """Swapping the axes of a square writer, which raises nothing, leaks."""
        writers = find_writers(model, self.rows)
        for number, writer in enumerate(writers):
            *_, rows, columns = model.get_parameter(writer.parameter).shape
            if rows == columns:
                # the other of the last two axes: 0 and 1 of a matrix, 1 and 2 of a stack
                other = 2 * model.get_parameter(writer.parameter).ndim - 3 - writer.hidden_axis
                swapped = replace(writer, hidden_axis=other)
                broken = [*writers[:number], swapped, *writers[number + 1 :]]
                assert measure_leak(model, broken) > NOTICEABLE_LEAK, writer.parameter
                break

    def test_forgotten_biases_and_norms_are_noticed(self, model: nn.Module) -> None:
        """A writer's bias and the norm after it are part of what it writes."""
        writers = find_writers(model, self.rows)
        if any(writer.bias for writer in writers):
            assert (
                measure_leak(model, [replace(writer, bias=None) for writer in writers])
                > NOTICEABLE_LEAK
            )
        for field in ("post_norm", "outer_norm"):
            if any(_changes(model, getattr(writer, field)) for writer in writers):
                broken = [_without_norm(writer, field) for writer in writers]
                assert measure_leak(model, broken) > NOTICEABLE_LEAK, field

    def test_a_writer_is_seen_as_expert_hidden_fan_in_without_a_copy(
        self, model: nn.Module
    ) -> None:
        """The oriented view has the stream at axis 1 and shares the parameter's storage."""
        for writer in find_writers(model, self.rows):
            parameter = model.get_parameter(writer.parameter)
            view = oriented(parameter, writer)
            assert view.ndim == 3
            assert view.shape[1] == hidden_size(model)
            assert view.data_ptr() == parameter.data_ptr()

    def test_an_edit_changes_writers_only_and_is_undone(self, model: nn.Module) -> None:
        """Embeddings, heads, readers and other towers stay as they are."""
        writers = find_writers(model, self.rows)
        prefix, _ = find_blocks(model)
        written = {name for writer in writers for name in (writer.parameter, writer.bias) if name}
        assert all(name.startswith(f"{prefix}.") for name in written)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with ablate_writers(model, writers, random_direction(model)):
            changed = {
                name
                for name, parameter in model.named_parameters()
                if not torch.equal(parameter, before[name])
            }
        assert changed == written
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_writers_come_in_order_of_layer_and_component(self, model: nn.Module) -> None:
        """The order is the same every time, and no parameter comes twice."""
        writers = find_writers(model, self.rows)
        assert writers == find_writers(model, self.rows)
        order = [(w.layer, COMPONENT_NAMES.index(w.component), w.parameter) for w in writers]
        assert order == sorted(order)
        assert len({writer.parameter for writer in writers}) == len(writers)


def _component(writer: Writer) -> str:
    return writer.component


def _within_block(prefix: str, writer: Writer) -> str:
    return writer.parameter.removeprefix(f"{prefix}.{writer.layer}.")


def _changes(model: nn.Module, norm: str | None) -> bool:
    """Return whether `norm` has weights, rather than only scaling the whole vector."""
    return norm is not None and any(True for _ in model.get_submodule(norm).parameters())


def _without_norm(writer: Writer, field: str) -> Writer:
    """Return `writer` without one of its norms."""
    if field == "post_norm":
        return replace(writer, post_norm=writer.outer_norm, outer_norm=None)
    return replace(writer, outer_norm=None)
