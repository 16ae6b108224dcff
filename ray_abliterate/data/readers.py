"""Readers of rows and columns: JSONL, CSV and Parquet files, saved data sets, the Hub.

Prompt sets and tables are read with these. Knows nothing about what the rows mean.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.data.hub import dataset_advice, first_line, retry
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe import TableSource

CSV_BLOCK_BYTES = 1 << 24
"""Bytes of a CSV file that are parsed at once; no row may be longer."""
PARQUET_BATCH = 256
"""Rows of a Parquet file that are in memory at once."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        number: Its index in the table, from 0.
        place: The same for people: file and line, or data set and row (from 1).
        values: Its cells by column; None where the row lacks a column.
    """

    number: int
    place: str
    values: Mapping[str, Any]


def find_path(given: str, base: Path) -> Path | None:
    """Return the file or folder of this name in the recipe's folder or the working folder."""
    candidates = (root / Path(given).expanduser() for root in (base, Path.cwd()))
    return next((path for path in candidates if path.exists()), None)


def existing_path(given: str, base: Path) -> Path:
    """Return what `find_path` finds.

    Raises:
        PromptSourceError: neither folder has it.
    """
    path = find_path(given, base)
    if path is None:
        raise PromptSourceError(f"{given} is neither in {base.absolute()} nor in {Path.cwd()}.")
    return path


def require_columns(place: object, columns: Iterable[str], known: Iterable[str]) -> None:
    """Check that all columns are known.

    Args:
        place: The file or data set, for errors.
        columns: What is to be read.
        known: The columns there are.

    Raises:
        PromptSourceError: one is missing; says which columns there are.
    """
    names = list(known)
    for column in columns:
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PromptSourceError(f"{place} has no column {column!r}.{hint} It has: {names}.")


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into an error that names the file.

    Raises:
        PromptSourceError: the file is not UTF-8, or can't be read.
    """
    try:
        yield
    except UnicodeDecodeError:
        raise PromptSourceError(f"{path} is not UTF-8 text; convert it first.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptSourceError(f"{path} cannot be read: {first_line(error)}") from None


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with a Hub data set into an error that says what to do.

    Raises:
        PromptSourceError: the data set can't be read.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        advice = dataset_advice(error, name)
        raise PromptSourceError(f"hub:{name}: {first_line(error)}\n  {advice}") from None


def file_rows(path: Path, columns: Sequence[str], also: Sequence[str] = ()) -> Iterator[TableRow]:
    """Read columns of a `.jsonl`, `.csv` or `.parquet` file, one row after the other.

    Args:
        path: The file.
        columns: What to read; the first row of a JSONL file must have all of them.
        also: Further endings that the caller reads itself, for the error.

    Raises:
        PromptSourceError: the file can't be read, or lacks a column. Rows before a broken one have
            been handed out by then.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    ending = path.suffix.lower()
    if not path.is_file() or ending not in readers:
        endings = ", ".join([*also, *readers])
        raise PromptSourceError(f"{path} is not a file that ends in {endings}.")
    return readers[ending](path, columns)


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    number = 0
    with file_errors(path), path.open(encoding="utf-8-sig") as file:
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
                require_columns(path, columns, row)
            yield TableRow(number, place, {column: row.get(column) for column in columns})
            number += 1


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    from pyarrow import csv, string

    read = csv.ReadOptions(block_size=CSV_BLOCK_BYTES)
    parse = csv.ParseOptions(newlines_in_values=True)
    with file_errors(path):
        with csv.open_csv(path, read, parse) as table:
            require_columns(path, columns, table.schema.names)
        # cells stay text, whatever they look like
        types = dict.fromkeys(columns, string())
        convert = csv.ConvertOptions(include_columns=list(columns), column_types=types)
        with csv.open_csv(path, read, parse, convert) as table:
            rows = (row for batch in table for row in batch.to_pylist())
            yield from numbered_rows(path, rows)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    from pyarrow import parquet

    with file_errors(path), parquet.ParquetFile(path) as table:
        require_columns(path, columns, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=PARQUET_BATCH, columns=list(columns))
        yield from numbered_rows(path, (row for batch in batches for row in batch.to_pylist()))


def numbered_rows(place: object, rows: Iterable[Mapping[str, Any]]) -> Iterator[TableRow]:
    """Give rows their numbers and places."""
    for number, row in enumerate(rows):
        yield TableRow(number, f"{place}, row {number + 1}", row)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether the `datasets` library saved this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def select_split(place: object, data: Any, source: TableSource) -> Any:
    """Return the split that a source names, or the only one there is.

    Raises:
        PromptSourceError: there is no such split, or there are several and none is named.
    """
    if not isinstance(data, dict):
        return data
    name = source.split_name or (next(iter(data)) if len(data) == 1 else "")
    if name not in data:
        problem = f"has no split {name!r}" if name else "has several splits"
        raise PromptSourceError(f"{place} {problem}.\n  Set `split` to one of: {', '.join(data)}.")
    return data[name]


def stream_split(name: str, source: TableSource, revision: str | None) -> Any:
    """Open the split of a Hub data set, or of a folder of data files, as a stream."""
    import datasets

    split = source.split_name or None
    data = datasets.load_dataset(
        name, source.config, split=split, revision=revision, streaming=True
    )
    return select_split(name, data, source)


def dataset_rows(place: object, data: Any, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Read columns of a data set; others are not decoded where their names are known.

    Raises:
        PromptSourceError: the data set, or its first row, lacks a column.
    """
    if data.column_names is not None:
        require_columns(place, columns, data.column_names)
        data = data.select_columns(list(columns))
    for number, row in enumerate(data):
        if number == 0:
            require_columns(place, columns, row)
        yield {column: row.get(column) for column in columns}


def current_commit(source: TableSource) -> str:
    """Return the commit that a Hub data set's revision points to now."""
    from huggingface_hub import HfApi

    name = str(source.dataset)
    info = retry(lambda: HfApi().dataset_info(name, revision=source.revision, timeout=30.0))
    return str(info.sha)
