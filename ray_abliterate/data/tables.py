"""Rows of a table, one after the other, each with its place: files, saved data sets, the Hub.

Memory does not grow with the table. Knows nothing about what the rows mean.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ray_abliterate.data.hub import retry
from ray_abliterate.data.prompt_sources import (
    CSV_BLOCK,
    commit_of,
    existing,
    find,
    hub_advice,
    is_saved,
    one_split,
    readable,
    refuse_unknown,
)
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe import TableSource

T = TypeVar("T")

BUILTIN = Path(__file__).parent / "builtin" / "tables"
BATCH = 256
"""Rows of a Parquet file that are in memory at once."""


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        number: Its place in the table, from 0.
        place: The same for people: file and line, or data set and row (from 1).
        values: By column.
    """

    number: int
    place: str
    values: Mapping[str, Any]


def stream_table(source: TableSource, base: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    """The rows of a table that a recipe names, in order.

    Args:
        source: Where they are.
        base: The recipe's folder; relative paths are looked up there, then in the working folder.
        columns: What to read of them; the first row must have all.

    Raises:
        PromptSourceError: the table can't be read, or lacks a column. Raised where the reading is,
            so rows before a broken one have been handed out.
    """
    start, stop = source.bounds
    found = False
    for row in islice(_rows(source, base, columns), start, stop):
        found = True
        yield row
    if not found:
        place = source.builtin or source.file or source.folder or source.dataset
        raise PromptSourceError(f"{place} {source.split} selects nothing. Check `split`.")


def _rows(source: TableSource, base: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    if source.dataset:
        folder = find(source.dataset, base)
        if folder is None or not folder.is_dir():
            return _hub(source, columns)
        return _folder(folder, source, columns)
    if source.folder:
        return _folder(existing(source.folder, base), source, columns)
    if source.split_name:
        raise PromptSourceError(f"a file has no split {source.split_name!r}; write only `[:400]`.")
    if source.builtin:
        return _file(_builtin(source.builtin), columns)
    return _file(existing(str(source.file), base), columns)


def _builtin(name: str) -> Path:
    path = BUILTIN / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BUILTIN.glob("*.jsonl")))
        raise PromptSourceError(f"no table {name!r} ships with the package. Known: {known}.")
    return path


def _file(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    ending = path.suffix.lower()
    if not path.is_file() or ending not in readers:
        raise PromptSourceError(f"{path} is not a file that ends in {', '.join(readers)}.")
    return readers[ending](path, columns)


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    number = 0
    with readable(path), path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            place = f"{path}, line {line}"
            try:
                row = json.loads(text)
            except ValueError as error:
                raise PromptSourceError(f"{place}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise PromptSourceError(f"{place}: not a JSON object: {text.strip()[:60]}")
            if number == 0:
                _refuse_missing(path, columns, row)
            yield TableRow(number, place, {column: row.get(column) for column in columns})
            number += 1


def _csv(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    from pyarrow import csv, string

    read = csv.ReadOptions(block_size=CSV_BLOCK)
    parse = csv.ParseOptions(newlines_in_values=True)
    with readable(path):
        with csv.open_csv(path, read, parse) as table:
            _refuse_missing(path, columns, table.schema.names)
        types = dict.fromkeys(columns, string())
        only = csv.ConvertOptions(include_columns=list(columns), column_types=types)
        with csv.open_csv(path, read, parse, only) as table:
            yield from _numbered(path, (row for batch in table for row in batch.to_pylist()))


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    from pyarrow import parquet

    with readable(path), parquet.ParquetFile(path) as table:
        _refuse_missing(path, columns, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=BATCH, columns=list(columns))
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))


def _folder(folder: Path, source: TableSource, columns: Sequence[str]) -> Iterator[TableRow]:
    """What `datasets` saved; otherwise data files, as a downloaded Hub data set has them."""
    import datasets

    with readable(folder):
        if is_saved(folder):
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(str(folder), source.config, streaming=True)
        chosen = one_split(folder, data, source)
        yield from _numbered(folder, _cells(folder, chosen, columns))


def _hub(source: TableSource, columns: Sequence[str]) -> Iterator[TableRow]:
    """A stream from the Hub, opened again behind the last row when it breaks."""
    import datasets

    name = str(source.dataset)
    with hub_advice(name):
        revision = commit_of(source)

        def opened(seen: int) -> Iterator[Mapping[str, Any]]:
            split = source.split_name or None
            data = datasets.load_dataset(
                name, source.config, split=split, revision=revision, streaming=True
            )
            chosen = one_split(name, data, source)
            return iter(_cells(name, chosen.skip(seen) if seen else chosen, columns))

        yield from _numbered(f"hub:{name}", unbroken(opened))


def unbroken(opened: Callable[[int], Iterator[T]]) -> Iterator[T]:
    """A stream that goes on where it was when reading fails for a reason that may pass.

    Args:
        opened: The stream, from the row with this number on.

    Raises:
        Exception: what the stream raised, if that can't pass, or has come again and again.
    """
    seen, stream = 0, None
    end = object()

    def pull() -> Any:
        nonlocal stream
        try:
            stream = stream or opened(seen)
            return next(stream, end)
        except Exception:
            stream = None  # a stream that raised is over
            raise

    while (row := retry(pull)) is not end:
        seen += 1
        yield row


def _cells(place: object, data: Any, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    if data.column_names is not None:
        _refuse_missing(place, columns, data.column_names)
        data = data.select_columns(list(columns))
    for number, row in enumerate(data):
        if number == 0:
            _refuse_missing(place, columns, row)
        yield {column: row.get(column) for column in columns}


def _numbered(place: object, rows: Iterator[Mapping[str, Any]]) -> Iterator[TableRow]:
    for number, row in enumerate(rows):
        yield TableRow(number, f"{place}, row {number + 1}", row)


def _refuse_missing(place: object, columns: Sequence[str], known: Any) -> None:
    for column in columns:
        refuse_unknown(place, column, known)
