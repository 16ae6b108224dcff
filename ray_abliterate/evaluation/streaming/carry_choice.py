"""Chooses how a text is evaluated: what is carried, and where chunks lie. Feeds nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ray_abliterate.errors import EvaluationError, UnsupportedCarry
from ray_abliterate.evaluation.streaming.capability_check import SINGLE, Capabilities
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.chunk_geometry import ChunkGeometry
from ray_abliterate.evaluation.streaming.pass_size import kv_bytes_per_token
from ray_abliterate.model.devices import free_bytes

CHUNK = 2048
"""Tokens of an independent chunk: its size is part of the result, so it does not follow memory."""
OVERLAP_SHARE = 4
"""Of an independent chunk, one in so many tokens is context."""
WINDOW = 1024


@dataclass(frozen=True)
class StreamingSettings:
    """What the user asks for; what is unset is chosen.

    Attributes:
        carry: What a chunk knows of the text before it.
        chunk_size: Tokens of a chunk, overlap included.
        overlap: Tokens of an independent chunk that are context only.
        window: Tokens that attention reaches back to.
        max_tokens: Tokens of a text that count.
    """

    carry: CarriedContext | None = None
    chunk_size: int | None = None
    overlap: int | None = None
    window: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 2), ("window", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} = {value} is too few.\n  Set it to {least} or more.")
        if self.chunk_size is not None:
            ChunkGeometry(self.carry or CarriedContext.NONE, self.chunk_size, self.overlap or 0)
        if self.carry is not None:
            self.refuse_window(self.carry)

    def refuse_window(self, carry: CarriedContext) -> None:
        """A window is for the carry of that name.

        Raises:
            EvaluationError: there is one, and the carry is another.
        """
        if self.window is not None and carry is not CarriedContext.WINDOW:
            raise EvaluationError(
                f"window = {self.window} with carry = {carry.value}: nothing is bounded by it.\n"
                "  Set carry = window, or leave window unset."
            )


@dataclass(frozen=True)
class CarryChoice:
    """How a text is evaluated.

    Attributes:
        geometry: The carry, and where chunks lie.
        window: Tokens that attention reaches back to, if that is bounded.
        notes: Why, where it was not the user who chose.
    """

    geometry: ChunkGeometry
    window: int | None
    notes: tuple[str, ...]

    @property
    def carry(self) -> CarriedContext:
        """What chunks hand on."""
        return self.geometry.carry


class CarryChooser:
    """Makes choices for one model."""

    def __init__(
        self,
        module: Any,
        device: torch.device,
        findings: Capabilities,
        settings: StreamingSettings,
        most_per_pass: Callable[[int | None], int],
    ) -> None:
        """
        Args:
            module: The model.
            device: Where it is.
            findings: What it can carry.
            settings: What is asked for.
            most_per_pass: Tokens of a pass that fit, for a window or without one.

        Raises:
            UnsupportedCarry: the model can't carry what is asked for.
            EvaluationError: the settings can't be.
        """
        self._module, self._device, self._findings = module, device, findings
        self._config: Any = getattr(module, "config", None)
        self._settings, self._most_per_pass = settings, most_per_pass
        if settings.carry is not None:
            self._refuse(settings.carry)
            self.choose(None)  # settings that can't be are refused before a text is read

    def choose(self, length: int | None) -> CarryChoice:
        """How a text of so many tokens is evaluated; None if that is not known.

        Raises:
            EvaluationError: the settings can't be.
        """
        notes = list(self._findings.notes)
        carry = self._settings.carry
        if carry is None:
            carry, why = self._most_exact(length)
            notes.append(f"carry = {carry.value}: {why}")
        if self._findings.per_pass[carry] == 1:
            notes.append(f"carry = {carry.value} goes token by token: {SINGLE}")
        self._settings.refuse_window(carry)
        window = None
        if carry is CarriedContext.WINDOW:
            window = self._settings.window or min(WINDOW, trained_positions(self._config) or WINDOW)
        return CarryChoice(self._geometry(carry, window), window, tuple(notes))

    def _geometry(self, carry: CarriedContext, window: int | None) -> ChunkGeometry:
        size, overlap = self._settings.chunk_size, self._settings.overlap
        if carry is not CarriedContext.NONE:
            size = self._most_per_pass(window) if size is None else size
            return ChunkGeometry(carry, size, overlap or 0)
        most = min(CHUNK, trained_positions(self._config) or CHUNK)
        size = max(most, 2 * (overlap or 0)) if size is None else size
        return ChunkGeometry(carry, size, size // OVERLAP_SHARE if overlap is None else overlap)

    def _most_exact(self, length: int | None) -> tuple[CarriedContext, str]:
        """The first of state, kv, window, none that the model can do and that fits."""
        able, memory = self._findings.per_pass, self._findings.memory
        if able.get(CarriedContext.STATE) == 0:
            return CarriedContext.STATE, "its state is exact and of constant size"
        if CarriedContext.KV in able:
            if not memory.full:
                return CarriedContext.KV, "exact; the model's own windows bound its cache"
            why = self._does_not_fit(length)
            if not why:
                return CarriedContext.KV, "exact, and keys and values of the text fit"
        else:
            why = self._findings.refused.get(CarriedContext.KV, "")
        if able.get(CarriedContext.WINDOW) == 0 and not position_limit(self._module):
            return CarriedContext.WINDOW, f"constant memory; kv would be exact, but {why}"
        return CarriedContext.NONE, why or self._findings.refused.get(
            CarriedContext.STATE, "nothing else is right"
        )

    def _does_not_fit(self, length: int | None) -> str:
        if length is None:
            return "the length of the text is not known"
        limit = trained_positions(self._config)
        if limit and length > limit:
            return f"the text has {length} tokens, and the model was made for {limit}"
        size = next(self._module.parameters()).element_size()
        text = self._config.get_text_config(decoder=True)
        each = kv_bytes_per_token(text, self._findings.memory.full, size)
        free = free_bytes(self._device)
        if each * length > free:
            return f"{each * length / 1e9:.1f} GB of keys and values don't fit in {free / 1e9:.1f}"
        return ""

    def _refuse(self, carry: CarriedContext) -> None:
        if carry not in self._findings.per_pass:
            able = ", ".join(c.value for c in CarriedContext if c in self._findings.per_pass)
            raise UnsupportedCarry(
                f"carry = {carry.value} with {type(self._module).__name__}: "
                f"{self._findings.refused[carry]}.\n  Set carry to one of: {able}."
            )


def parse_carry(given: CarriedContext | str | None) -> CarriedContext | None:
    """A carry by its name.

    Raises:
        EvaluationError: there is none of this name.
    """
    try:
        return None if given is None else CarriedContext(given)
    except ValueError:
        known = ", ".join(carry.value for carry in CarriedContext)
        raise EvaluationError(f"carry = {given!r} is not one of: {known}.") from None


def trained_positions(config: Any) -> int | None:
    """Positions that a model was made for."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def position_limit(module: Any) -> int | None:
    """Positions beyond which a model can't be asked, or would be another one: those of a learned
    table, and those from which rotary frequencies change with the length of the text."""
    config: Any = getattr(module, "config", None)
    limit = trained_positions(config) if config is not None else None
    if limit is None:
        return None
    named = module.named_modules()
    if any("wpe" in name.split(".") or "embed_positions" in name for name, _ in named):
        return limit
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return int(rope.get("original_max_position_embeddings") or limit)
    return None
