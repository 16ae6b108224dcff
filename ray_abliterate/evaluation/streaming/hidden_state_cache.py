"""States in the middle of a model, kept in files: what an edit above them leaves as it was.

The states that go into block `layer` depend on the blocks below it, on the text, and on how it was
cut. A model whose blocks below are the same to the last bit gets the same states, whatever was
edited above; so they are named by the content of all that, and not by a plan:

    key(layer, chunk) = SHA-256(all parameters and buffers but those of blocks >= layer,
                                configuration, carry, window, cuts, tokens up to the chunk's end)

Reading them in place of computing them is exact: the same bits go into the same code.
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

from ray_abliterate.data.atomic_files import write_whole
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.carry_choice import CarryChoice

log = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
WHOLE = "whole"
"""Marks a text whose states are there to its end."""


class HiddenStateCache:
    """A folder of states with a limit; the texts that were used longest ago go first."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        """
        Args:
            folder: Made if it is not there; nothing else should be in it.
            most_bytes: Of all files.
        """
        self.folder, self._most = folder, most_bytes

    def has(self, text: str, carried: bool) -> bool:
        """Whether there are states of a text; to its end, if chunks need those before them."""
        place = self.folder / text
        return (place / WHOLE).exists() if carried else place.is_dir()

    def read(self, text: str, chunk: str) -> Tensor | None:
        """States of a chunk, `"token hidden"`, mapped from the file; None if they are not there."""
        path = self.folder / text / f"{chunk}.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                states: Tensor = file.get_tensor("states")
            os.utime(path.parent)
        except (OSError, SafetensorError):
            return None
        return states

    def write(self, text: str, chunk: str, states: Tensor) -> bool:
        """Keep a chunk's states; False if there is no room, and the text is given up."""
        place = self.folder / text
        size = states.numel() * states.element_size()
        try:
            if self._room(size, place):
                place.mkdir(parents=True, exist_ok=True)
                write_whole(place / f"{chunk}.safetensors", save({"states": states.contiguous()}))
                return True
            log.warning("states of a text don't fit into %s", self.folder)
        except OSError as error:  # a full disk, another process: what is kept only saves time
            log.warning("states can't be written to %s: %s", place, error)
        shutil.rmtree(place, ignore_errors=True)
        return False

    def end(self, text: str) -> None:
        """All chunks of a text are there."""
        with suppress(OSError):  # then they are made anew
            if (self.folder / text).is_dir():
                write_whole(self.folder / text / WHOLE, b"")

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(_size(place) for place in self._texts())

    def _room(self, size: int, own: Path) -> bool:
        """Make room by deleting other texts, the ones used longest ago first."""
        sizes = {place: _size(place) for place in self._texts()}
        others = sorted((p for p in sizes if p != own), key=lambda p: p.stat().st_mtime)
        while sum(sizes.values()) + size > self._most and others:
            shutil.rmtree(gone := others.pop(0), ignore_errors=True)
            del sizes[gone]
        return sum(sizes.values()) + size <= self._most

    def _texts(self) -> list[Path]:
        return [p for p in self.folder.iterdir() if p.is_dir()] if self.folder.is_dir() else []


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir())


def layer_keys(module: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """For each block, what its input depends on beside the text: all weights but those of this
    block and of those behind it, bit for bit, and how they are computed with."""
    digest = hashlib.sha256()
    config: Any = getattr(module, "config", None)
    facts = {
        "config": config.to_dict() if config is not None else {},
        "attention": getattr(config, "_attn_implementation", ""),
        "versions": (torch.__version__, version("transformers")),
        "threads": torch.get_num_threads(),
        "device": str(next(module.parameters()).device),
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    inside = {id(tensor) for block in blocks for _, tensor in _tensors(block)}
    _update(digest, ((name, t) for name, t in _tensors(module) if id(t) not in inside))
    keys = []
    for block in blocks:
        keys.append(digest.hexdigest())
        _update(digest, _tensors(block))
    return keys


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _update(digest: Any, named: Iterator[tuple[str, Tensor]]) -> None:
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)


def has_hooks(module: nn.Module) -> bool:
    """Whether something other than weights decides what a module computes."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class StatesMissing(Exception):
    """States of a text that were there at its beginning are not there any more."""


class TextStates:
    """The states of one text, while it is read.

    Attributes:
        layer: Block that passes begin at; 0 if all are run.
        record: Blocks whose inputs are kept.
    """

    def __init__(
        self,
        files: HiddenStateCache,
        models: Sequence[str],
        record: Sequence[int],
        choice: CarryChoice,
        serves: Callable[[int], bool],
    ) -> None:
        """
        Args:
            files: Where they are.
            models: By block, what its input depends on beside the text.
            record: Blocks whose inputs are wanted by later evaluations.
            choice: How the text is read.
            serves: Whether passes of this model can begin at a block.
        """
        geometry = choice.geometry
        self._cuts = (choice.carry.value, choice.window, geometry.chunk_size, geometry.overlap)
        self._carried = choice.carry is not CarriedContext.NONE
        self._files, self._models, self._serves = files, models, serves
        self._texts: dict[int, str] = {}
        self._chunk = ""
        self.layer = 0
        self.record = tuple(layer for layer in record if 0 < layer < len(models))

    def known(self, ids: Tensor, size: int) -> Tensor | None:
        """States of the next chunk, `"token hidden"`, if they are there; its first chunk names a
        text whose chunks depend on those before them.

        Args:
            ids: Tokens that are fed.
            size: Tokens of a pass.

        Raises:
            StatesMissing: chunks before it had states.
        """
        behind = self._chunk if self._carried else ""
        self._chunk = _name(behind, self._cuts, size, ids.numpy().tobytes())
        if not self._texts:
            self._open(self._chunk if self._carried else "")
        if not self.layer:
            return None
        found = self._files.read(self._texts[self.layer], self._chunk)
        if found is None and self._carried:
            raise StatesMissing
        return found

    def keep(self, states: Mapping[int, Tensor]) -> None:
        """States of the chunk that was asked for last, by block."""
        for layer in self.record:
            if not self._files.write(self._texts[layer], self._chunk, states[layer]):
                self.record = tuple(other for other in self.record if other != layer)

    def end(self) -> None:
        """The text has ended."""
        for layer in self.record:
            self._files.end(self._texts[layer])

    def stop_recording(self) -> None:
        """Nothing is kept any more."""
        self.record = ()

    def _open(self, first: str) -> None:
        self._texts = {
            layer: _name(model, self._cuts, 0, first.encode())
            for layer, model in enumerate(self._models)
            if layer
        }
        there = [n for n, text in self._texts.items() if self._files.has(text, self._carried)]
        self.layer = next((layer for layer in reversed(there) if self._serves(layer)), 0)
        self.record = tuple(layer for layer in self.record if self._serves(layer))
        if self.layer and self._carried:
            self.record = ()


def _name(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part} ".encode())
    return digest.hexdigest()[:32]
