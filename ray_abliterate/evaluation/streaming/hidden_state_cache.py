"""Caches the hidden states in the middle of a model in files: an edit above leaves them unchanged.

The states that go into block `layer` depend on the blocks below it, on the text, and on how it was
cut. A model whose blocks below are the same to the last bit gets the same states, whatever was
edited above; so files are named after the content of all that, and not after a plan:

    key(layer, chunk) = SHA-256(all parameters and buffers but those of blocks >= layer,
                                configuration, carry, window, cuts, tokens up to the chunk's end)

Reading states instead of computing them is exact: the same bits go into the same code.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.carry_choice import CarryChoice

log = logging.getLogger(__name__)

MAX_BYTES = 4 << 30
COMPLETE = "whole"
"""Name of the file that marks a text whose states are cached to its end."""


class HiddenStateCache:
    """A folder of hidden states with a size limit; the least recently used texts go first."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        """
        Args:
            folder: Created if it does not exist; nothing else should be in it.
            max_bytes: Limit for all files together.
        """
        self.folder, self._max_bytes = folder, max_bytes

    def has(self, text: str, carried: bool) -> bool:
        """Return whether there are states of a text.

        They have to reach its end if chunks depend on those before them (`carried`).
        """
        folder = self.folder / text
        return (folder / COMPLETE).exists() if carried else folder.is_dir()

    def read(self, text: str, chunk: str) -> Tensor | None:
        """Return the states of a chunk, `"token hidden"`, mapped from its file; None if absent."""
        path = self.folder / text / f"{chunk}.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                states: Tensor = file.get_tensor("states")
            os.utime(path.parent)
        except (OSError, SafetensorError):
            return None
        return states

    def write(self, text: str, chunk: str, states: Tensor) -> bool:
        """Store a chunk's states, `"token hidden"`.

        Returns False, and drops the text, if there is no room or the disk fails.
        """
        folder = self.folder / text
        size = states.numel() * states.element_size()
        try:
            if self._make_room(size, folder):
                folder.mkdir(parents=True, exist_ok=True)
                data = save({"states": states.contiguous()})
                write_atomically(folder / f"{chunk}.safetensors", data)
                return True
            log.warning("the hidden states of a text don't fit into %s", self.folder)
        except OSError as error:  # a full disk, or another process; the cache only saves time
            log.warning("hidden states can't be written to %s: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return False

    def mark_complete(self, text: str) -> None:
        """Record that all chunks of a text are stored."""
        with suppress(OSError):  # then the next reading computes them again
            if (self.folder / text).is_dir():
                write_atomically(self.folder / text / COMPLETE, b"")

    @property
    def bytes(self) -> int:
        """Return the size of all files."""
        return sum(_folder_bytes(folder) for folder in self._texts())

    def _make_room(self, size: int, folder: Path) -> bool:
        """Delete other texts, the least recently used first; return whether `size` fits then."""
        sizes = {text: _folder_bytes(text) for text in self._texts()}
        others = sorted((p for p in sizes if p != folder), key=lambda p: p.stat().st_mtime)
        while sum(sizes.values()) + size > self._max_bytes and others:
            shutil.rmtree(oldest := others.pop(0), ignore_errors=True)
            del sizes[oldest]
        return sum(sizes.values()) + size <= self._max_bytes

    def _texts(self) -> list[Path]:
        return [p for p in self.folder.iterdir() if p.is_dir()] if self.folder.is_dir() else []


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def layer_keys(module: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """Return, for each block, a hash of everything but the text that its input depends on.

    That is all weights but those of this block and of the blocks behind it, bit for bit, and the
    settings that decide how they are computed with.
    """
    digest = hashlib.sha256()
    config: Any = getattr(module, "config", None)
    settings = {
        "config": config.to_dict() if config is not None else {},
        "attention": getattr(config, "_attn_implementation", ""),
        "versions": (torch.__version__, version("transformers")),
        "threads": torch.get_num_threads(),
        "device": str(next(module.parameters()).device),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    in_blocks = {id(tensor) for block in blocks for _, tensor in _named_tensors(block)}
    _update(digest, ((name, t) for name, t in _named_tensors(module) if id(t) not in in_blocks))
    keys = []
    for block in blocks:
        keys.append(digest.hexdigest())
        _update(digest, _named_tensors(block))
    return keys


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _update(digest: Any, named: Iterator[tuple[str, Tensor]]) -> None:
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)


def has_hooks(module: nn.Module) -> bool:
    """Return whether something other than weights decides what a module computes."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class StatesMissing(Exception):
    """States of a text that were cached when its reading began are no longer there."""


class TextStates:
    """The cached states of one text, while it is read.

    Attributes:
        start_block: Block that passes begin at; 0 if all blocks are run.
        recorded_blocks: Blocks whose inputs are stored.
    """

    def __init__(
        self,
        cache: HiddenStateCache,
        layer_keys: Sequence[str],
        recorded_blocks: Sequence[int],
        choice: CarryChoice,
        can_begin_at: Callable[[int], bool],
    ) -> None:
        """
        Args:
            cache: Where states are stored.
            layer_keys: For each block, what its input depends on besides the text.
            recorded_blocks: Blocks whose inputs later evaluations will want.
            choice: How the text is read.
            can_begin_at: Returns whether passes of this model can begin at a block.
        """
        geometry = choice.geometry
        self._cuts = (choice.carry.value, choice.window, geometry.chunk_size, geometry.overlap)
        self._carried = choice.carry is not CarriedContext.NONE
        self._cache, self._layer_keys, self._can_begin_at = cache, layer_keys, can_begin_at
        self._texts: dict[int, str] = {}
        self._chunk = ""
        self.start_block = 0
        self.recorded_blocks = tuple(b for b in recorded_blocks if 0 < b < len(layer_keys))

    def look_up(self, ids: Tensor, size: int) -> Tensor | None:
        """Return the states of the next chunk, `"token hidden"`, or None if there are none.

        The first chunk names the text, if chunks depend on those before them.

        Args:
            ids: Tokens that are fed.
            size: Tokens of a pass.

        Raises:
            StatesMissing: the chunks before it had states, but this one has none.
        """
        preceding = self._chunk if self._carried else ""
        self._chunk = _hash(preceding, self._cuts, size, ids.numpy().tobytes())
        if not self._texts:
            self._open(self._chunk if self._carried else "")
        if not self.start_block:
            return None
        states = self._cache.read(self._texts[self.start_block], self._chunk)
        if states is None and self._carried:
            raise StatesMissing
        return states

    def store(self, states: Mapping[int, Tensor]) -> None:
        """Store the states, by block, of the chunk that was looked up last."""
        for block in self.recorded_blocks:
            if not self._cache.write(self._texts[block], self._chunk, states[block]):
                self.recorded_blocks = tuple(b for b in self.recorded_blocks if b != block)

    def mark_complete(self) -> None:
        """Record that the text has been read to its end."""
        for block in self.recorded_blocks:
            self._cache.mark_complete(self._texts[block])

    def stop_recording(self) -> None:
        """Store no states from now on."""
        self.recorded_blocks = ()

    def _open(self, first_chunk: str) -> None:
        """Find the deepest block that this text's states let passes begin at."""
        self._texts = {
            block: _hash(key, self._cuts, 0, first_chunk.encode())
            for block, key in enumerate(self._layer_keys)
            if block
        }
        cached = [n for n, text in self._texts.items() if self._cache.has(text, self._carried)]
        able = (block for block in reversed(cached) if self._can_begin_at(block))
        self.start_block = next(able, 0)
        self.recorded_blocks = tuple(b for b in self.recorded_blocks if self._can_begin_at(b))
        if self.start_block and self._carried:
            self.recorded_blocks = ()


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part} ".encode())
    return digest.hexdigest()[:32]
