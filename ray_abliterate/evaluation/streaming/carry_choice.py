"""Chooses what is carried through a text, and where its chunks lie. Feeds nothing to a model."""

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
"""Tokens of an independent chunk. Its size is part of the result, so it does not follow memory."""
OVERLAP_SHARE = 4
"""One token in so many of an independent chunk is context only."""
WINDOW = 1024
"""Tokens that attention reaches back to with carry = window, if the user does not say."""


@dataclass(frozen=True)
class StreamingSettings:
    """What the user asks for; what is None is chosen for them.

    Attributes:
        carry: What a chunk knows of the text before it.
        chunk_size: Tokens of a chunk, the overlap included.
        overlap: Tokens of an independent chunk that are context only.
        window: Tokens that attention reaches back to.
        max_tokens: Tokens of a text that count.

    Raises:
        EvaluationError: a setting is out of range, or contradicts another one.
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
        """Refuse a window if something else is carried.

        Raises:
            EvaluationError: `window` is set, and `carry` is not `window`.
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
        geometry: What is carried, and where chunks lie.
        window: Tokens that attention reaches back to, if that is bounded.
        notes: What was chosen on the user's behalf, and why.
    """

    geometry: ChunkGeometry
    window: int | None
    notes: tuple[str, ...]

    @property
    def carry(self) -> CarriedContext:
        """Return what chunks hand on."""
        return self.geometry.carry


class CarryChooser:
    """Chooses how one model reads texts."""

    def __init__(
        self,
        module: Any,
        device: torch.device,
        capabilities: Capabilities,
        settings: StreamingSettings,
        max_pass_size: Callable[[int | None], int],
    ) -> None:
        """
        Args:
            module: The model.
            device: The device it is on.
            capabilities: What it can carry.
            settings: What is asked for.
            max_pass_size: Returns how many tokens fit into a pass, for a window or None.

        Raises:
            UnsupportedCarry: the model can't carry what is asked for.
            EvaluationError: the settings contradict each other.
        """
        self._module, self._device, self._capabilities = module, device, capabilities
        self._config: Any = getattr(module, "config", None)
        self._settings, self._max_pass_size = settings, max_pass_size
        if settings.carry is not None:
            self._refuse_unsupported(settings.carry)
            self.choose(None)  # impossible settings are refused before a text is read

    def choose(self, length: int | None) -> CarryChoice:
        """Choose how a text of `length` tokens is evaluated; None if its length is unknown.

        Raises:
            EvaluationError: the settings contradict each other.
        """
        notes = list(self._capabilities.notes)
        carry = self._settings.carry
        if carry is None:
            carry, reason = self._most_exact(length)
            notes.append(f"carry = {carry.value}: {reason}")
        if self._capabilities.pass_limits[carry] == 1:
            notes.append(f"carry = {carry.value} goes token by token: {SINGLE}")
        self._settings.refuse_window(carry)
        window = None
        if carry is CarriedContext.WINDOW:
            window = self._settings.window or min(WINDOW, trained_positions(self._config) or WINDOW)
        return CarryChoice(self._geometry(carry, window), window, tuple(notes))

    def _geometry(self, carry: CarriedContext, window: int | None) -> ChunkGeometry:
        size, overlap = self._settings.chunk_size, self._settings.overlap
        if carry is not CarriedContext.NONE:
            size = self._max_pass_size(window) if size is None else size
            return ChunkGeometry(carry, size, overlap or 0)
        most = min(CHUNK, trained_positions(self._config) or CHUNK)
        size = max(most, 2 * (overlap or 0)) if size is None else size
        return ChunkGeometry(carry, size, size // OVERLAP_SHARE if overlap is None else overlap)

    def _most_exact(self, length: int | None) -> tuple[CarriedContext, str]:
        """Return the first of state, kv, window, none that the model can do and that fits."""
        limits, refused = self._capabilities.pass_limits, self._capabilities.refused
        if limits.get(CarriedContext.STATE) == 0:
            return CarriedContext.STATE, "its state is exact and of constant size"
        if CarriedContext.KV in limits:
            if not self._capabilities.cache_layers.full:
                return CarriedContext.KV, "exact; the model's own windows bound its cache"
            why_not = self._why_kv_does_not_fit(length)
            if not why_not:
                return CarriedContext.KV, "exact, and keys and values of the text fit"
        else:
            why_not = refused.get(CarriedContext.KV, "")
        if limits.get(CarriedContext.WINDOW) == 0 and not position_limit(self._module):
            return CarriedContext.WINDOW, f"constant memory; kv would be exact, but {why_not}"
        return CarriedContext.NONE, why_not or refused.get(
            CarriedContext.STATE, "nothing else is exact"
        )

    def _why_kv_does_not_fit(self, length: int | None) -> str:
        """Return why keys and values of a whole text are out of the question; empty if not."""
        if length is None:
            return "the length of the text is not known"
        limit = trained_positions(self._config)
        if limit and length > limit:
            return f"the text has {length} tokens, and the model was made for {limit}"
        size = next(self._module.parameters()).element_size()
        text = self._config.get_text_config(decoder=True)
        per_token = kv_bytes_per_token(text, self._capabilities.cache_layers.full, size)
        free = free_bytes(self._device)
        if per_token * length > free:
            needed, room = f"{per_token * length / 1e9:.1f}", f"{free / 1e9:.1f}"
            return f"{needed} GB of keys and values don't fit into {room} GB"
        return ""

    def _refuse_unsupported(self, carry: CarriedContext) -> None:
        if carry not in self._capabilities.pass_limits:
            able = ", ".join(c.value for c in CarriedContext if c in self._capabilities.pass_limits)
            raise UnsupportedCarry(
                f"carry = {carry.value} with {type(self._module).__name__}: "
                f"{self._capabilities.refused[carry]}.\n  Set carry to one of: {able}."
            )


def parse_carry(given: CarriedContext | str | None) -> CarriedContext | None:
    """Return a context by its name; None stays None.

    Raises:
        EvaluationError: there is none of this name.
    """
    try:
        return None if given is None else CarriedContext(given)
    except ValueError:
        known = ", ".join(carry.value for carry in CarriedContext)
        raise EvaluationError(f"carry = {given!r} is not one of: {known}.") from None


def trained_positions(config: Any) -> int | None:
    """Return the number of positions that a model was made for, if its configuration says so."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        positions = getattr(text, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return None


def position_limit(module: Any) -> int | None:
    """Return the number of positions beyond which a model fails, or would be a different one.

    Those are the positions of a learned table, and those from which rotary frequencies change with
    the length of the text. None if there is no such limit.
    """
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
