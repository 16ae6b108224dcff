"""Opens a source of tokens: arrays, iterators, files of tokens, texts, data sets of the Hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from ray_abliterate.data.safetensors_header import read_header
from ray_abliterate.errors import TokenSourceError
from ray_abliterate.evaluation.streaming.text_sources import (
    TABLES,
    HubText,
    TextFile,
    TextSource,
    open_table,
    require_tokenizer,
)
from ray_abliterate.evaluation.streaming.token_sources import TokenArray, TokenSource, TokenStream


@dataclass(frozen=True)
class _Options:
    """How a file or data set is read; see `open_source`."""

    column: str | None
    split: str
    config: str | None
    revision: str | None
    dtype: str


def open_source(
    spec: Any,
    tokenizer: Any = None,
    *,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    dtype: str = "uint16",
) -> TokenSource:
    """Open a text as tokens that are read as they are needed.

    It has many parameters because each of them belongs to one kind of source, and users give them
    by name.

    Args:
        spec: A one-dimensional tensor, array or list of ids; an iterator of ids or blocks of them;
            or where it is: `.npy`; `.bin` (bare little-endian ids of `dtype`); `.safetensors` (its
            only tensor, or the one named `tokens`); `.parquet`, `.arrow` or `.feather` (`column`
            of texts, of ids, or of lists of ids); `.txt` and any other ending for a text file;
            `hub:owner/name` for a data set that is streamed from the Hub.
        tokenizer: Makes tokens of texts; not needed for sources that hold tokens.
        column: Column of a table or data set; `tokens`, `input_ids` or `text` if unset.
        split: Split of a Hub data set.
        config: Configuration of a Hub data set.
        revision: Revision of a Hub data set.
        dtype: Type of the ids in a `.bin` file.

    Raises:
        TokenSourceError: the source does not exist, or is not what it should be.
    """
    if isinstance(spec, TokenSource):
        return spec
    if isinstance(spec, Tensor):
        return TokenArray(spec.detach().cpu().numpy(), "tensor")
    if isinstance(spec, numpy.ndarray | list | tuple):
        return TokenArray(numpy.asarray(spec, None if len(spec) else numpy.int64), "array")
    if isinstance(spec, str | Path):
        options = _Options(column, split, config, revision, dtype)
        return _open_location(str(spec), tokenizer, options)
    if hasattr(spec, "__iter__"):
        return TokenStream(iter(spec))
    raise TokenSourceError(
        f"source = {spec!r} ({type(spec).__name__}) is no source of tokens.\n"
        "  Give a tensor, an iterator of token blocks, a file, or hub:owner/name."
    )


def _open_location(location: str, tokenizer: Any, options: _Options) -> TokenSource:
    """Open a file, or a data set of the Hub."""
    if location.startswith("hub:"):
        dataset = HubText(
            location.removeprefix("hub:"), options.split, options.config, options.revision
        )
        return TextSource(dataset, require_tokenizer(tokenizer, location), options.column)
    path = Path(location).expanduser()
    if not path.is_file():
        raise TokenSourceError(
            f"source = {location!r} is not a file (looked up from {Path.cwd()}).\n"
            "  Give a file that exists, or hub:owner/name for a data set of the Hub."
        )
    mappers: dict[str, Callable[[Path], Any]] = {
        ".npy": _map_npy,
        ".safetensors": _map_safetensors,
        ".bin": lambda p: _map_bin(p, options.dtype),
    }
    ending = path.suffix.lower()
    if ending in mappers:
        return TokenArray(mappers[ending](path), str(path))
    if ending in TABLES:
        return open_table(path, tokenizer, options.column)
    return TextSource(TextFile(path), require_tokenizer(tokenizer, location), options.column)


def _map_npy(path: Path) -> Any:
    try:
        return numpy.load(path, mmap_mode="r")
    except ValueError as error:
        raise TokenSourceError(f"{path} is not a .npy array of integers: {error}.") from None


def _map_bin(path: Path, dtype: str) -> Any:
    try:
        little_endian = numpy.dtype(dtype).newbyteorder("<")
        if not path.stat().st_size:
            return numpy.empty(0, little_endian)  # an empty file cannot be mapped
        return _map_array(path, little_endian)
    except (TypeError, ValueError) as error:
        raise TokenSourceError(
            f"{path} can't be read as ids of dtype = {dtype!r}: {error}.\n"
            "  Set dtype to what it was written as: uint16, uint32, int32 or int64."
        ) from None


def _map_array(path: Path, dtype: Any, start: int = 0, shape: tuple[int, ...] | None = None) -> Any:
    """Map an array from a file, whose bytes are read only where they are looked at."""
    memmap: Any = numpy.memmap
    return memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def _map_safetensors(path: Path) -> Any:
    """Map a tensor: the format is a header and bare little-endian arrays."""
    dtypes = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "U16": "<u2", "U32": "<u4"}
    try:
        entries = read_header(path).tensors
    except ValueError:
        entries = {}
    name = "tokens" if "tokens" in entries else next(iter(entries), "")
    if not name or (len(entries) > 1 and name != "tokens"):
        names = ", ".join(entries) or "no tensor"
        raise TokenSourceError(
            f"{path} holds {names}; expected one tensor, or one that is named tokens."
        )
    entry = entries[name]
    if entry.dtype not in dtypes:
        raise TokenSourceError(f"{path}: {name} is {entry.dtype}; tokens are integers.")
    return _map_array(path, dtypes[entry.dtype], entry.start, entry.shape)
