"""Opens what a user names: arrays, iterators, token files on disk, texts, data sets of the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from ray_abliterate.errors import TokenSourceError
from ray_abliterate.evaluation.streaming import text_sources as text
from ray_abliterate.evaluation.streaming.token_sources import TokenArray, TokenSource, TokenStream


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
    """The tokens of a text, read as they are needed.

    Args:
        spec: A one-dimensional tensor, array or list of ids; an iterator of ids or blocks of them;
            or where it is: `.npy`; `.bin` (bare little-endian ids of `dtype`); `.safetensors` (its
            only tensor, or the one named `tokens`); `.parquet`, `.arrow` or `.feather` (`column`
            of texts, of ids, or of lists of ids); `.txt` and any other ending for a text file;
            `hub:owner/name` for a data set that is streamed from the Hub.
        tokenizer: Makes tokens of texts; not needed where there are tokens already.
        column: Column of a table or data set; `tokens`, `input_ids` or `text` if unset.
        split: Split of a Hub data set.
        config: Configuration of a Hub data set.
        revision: Revision of a Hub data set.
        dtype: Type of the ids in a `.bin` file.

    Raises:
        TokenSourceError: it is not there, or not what it should be.
    """
    if isinstance(spec, TokenSource):
        return spec
    if isinstance(spec, Tensor):
        return TokenArray(spec.detach().cpu().numpy(), "tensor")
    if isinstance(spec, numpy.ndarray | list | tuple):
        return TokenArray(numpy.asarray(spec, None if len(spec) else numpy.int64), "array")
    if isinstance(spec, str | Path):
        return _at(str(spec), tokenizer, column, split, config, revision, dtype)
    if hasattr(spec, "__iter__"):
        return TokenStream(iter(spec))
    raise TokenSourceError(
        f"source = {spec!r} ({type(spec).__name__}) is no source of tokens.\n"
        "  Give a tensor, an iterator of token blocks, a file, or hub:owner/name."
    )


def _at(
    place: str,
    tokenizer: Any,
    column: str | None,
    split: str,
    config: str | None,
    revision: str | None,
    dtype: str,
) -> TokenSource:
    if place.startswith("hub:"):
        where = text.HubText(place.removeprefix("hub:"), split, config, revision)
        return text.TextSource(where, text.require_tokenizer(tokenizer, place), column)
    path = Path(place).expanduser()
    if not path.is_file():
        raise TokenSourceError(
            f"source = {place!r} is not a file (looked up from {Path.cwd()}).\n"
            "  Give a file that exists, or hub:owner/name for a data set of the Hub."
        )
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _npy,
        ".safetensors": _safetensors,
        ".bin": lambda p: _bin(p, dtype),
    }
    ending = path.suffix.lower()
    if ending in readers:
        return TokenArray(readers[ending](path), str(path))
    if ending in text.TABLES:
        return text.open_table(path, tokenizer, column)
    return text.TextSource(text.TextFile(path), text.require_tokenizer(tokenizer, place), column)


def _npy(path: Path) -> Any:
    try:
        return numpy.load(path, mmap_mode="r")
    except ValueError as error:
        raise TokenSourceError(f"{path} is not a .npy array of integers: {error}.") from None


def _bin(path: Path, dtype: str) -> Any:
    try:
        kind = numpy.dtype(dtype).newbyteorder("<")
        if not path.stat().st_size:
            return numpy.empty(0, kind)
        return _mapped(path, kind)
    except (TypeError, ValueError) as error:
        raise TokenSourceError(
            f"{path} can't be read as ids of dtype = {dtype!r}: {error}.\n"
            "  Set dtype to what it was written as: uint16, uint32, int32 or int64."
        ) from None


def _mapped(path: Path, kind: Any, first: int = 0, shape: tuple[int, ...] | None = None) -> Any:
    """An array that is read from the file where it is looked at."""
    mapped: Any = numpy.memmap
    return mapped(path, dtype=kind, mode="r", offset=first, shape=shape)


def _safetensors(path: Path) -> Any:
    """Mapped, as the format is a header and bare little-endian arrays."""
    kinds = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "U16": "<u2", "U32": "<u4"}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            entries = json.loads(file.read(size)) if size < path.stat().st_size else {}
        except ValueError:
            entries = {}
    entries.pop("__metadata__", None)
    name = "tokens" if "tokens" in entries else next(iter(entries), "")
    if not name or (len(entries) > 1 and name != "tokens"):
        found = ", ".join(entries) or "no tensor"
        raise TokenSourceError(
            f"{path} holds {found}; expected one tensor, or one that is named tokens."
        )
    entry = entries[name]
    if entry["dtype"] not in kinds:
        raise TokenSourceError(f"{path}: {name} is {entry['dtype']}; tokens are integers.")
    first = 8 + size + entry["data_offsets"][0]
    shape = tuple(entry["shape"])
    return _mapped(path, kinds[entry["dtype"]], first, shape)
