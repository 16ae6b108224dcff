"""Rows of a table, one after the other, each with its place: files, saved data sets, the Hub.

Memory does not grow with the table. Knows nothing about what the rows mean.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ray_abliterate.data.hub import retry
from ray_abliterate.data.readers import (
    TableRow,
    current_commit,
    dataset_rows,
    existing_path,
    file_errors,
    file_rows,
    find_path,
    hub_errors,
    is_saved_dataset,
    numbered_rows,
    select_split,
    stream_split,
)
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe import TableSource

T = TypeVar("T")

BUILTIN = Path(__file__).parent / "builtin" / "tables"


def stream_table(source: TableSource, base: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    """Read the rows of a table that a recipe names, in order.

    Args:
        source: Where they are.
        base: The recipe's folder; relative paths are looked up there, then in the working folder.
        columns: What to read of them; the first row must have all.

    Raises:
        PromptSourceError: the table can't be read, or lacks a column. Raised where the reading is,
            so rows before a broken one have been handed out.
    """
    start, stop = source.bounds
    empty = True
    for row in islice(_rows(source, base, columns), start, stop):
        empty = False
        yield row
    if empty:
        place = source.builtin or source.file or source.folder or source.dataset
        raise PromptSourceError(f"{place} {source.split} selects nothing. Check `split`.")


def _rows(source: TableSource, base: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    if source.dataset:
        folder = find_path(source.dataset, base)
        if folder is None or not folder.is_dir():
            return _hub_rows(source, columns)
        return _folder_rows(folder, source, columns)
    if source.folder:
        return _folder_rows(existing_path(source.folder, base), source, columns)
    if source.split_name:
        raise PromptSourceError(f"a file has no split {source.split_name!r}; write only `[:400]`.")
    if source.builtin:
        return file_rows(_builtin_file(source.builtin), columns)
    return file_rows(existing_path(str(source.file), base), columns)


def _builtin_file(name: str) -> Path:
    path = BUILTIN / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BUILTIN.glob("*.jsonl")))
        raise PromptSourceError(f"no table {name!r} ships with the package. Known: {known}.")
    return path


def _folder_rows(folder: Path, source: TableSource, columns: Sequence[str]) -> Iterator[TableRow]:
    """Read what `datasets` saved; otherwise data files, as a downloaded Hub data set has them."""
    import datasets

    with file_errors(folder):
        if is_saved_dataset(folder):
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(str(folder), source.config, streaming=True)
        split = select_split(folder, data, source)
        yield from numbered_rows(folder, dataset_rows(folder, split, columns))


def _hub_rows(source: TableSource, columns: Sequence[str]) -> Iterator[TableRow]:
    """Stream from the Hub; the stream is opened again behind the last row when it breaks."""
    name = str(source.dataset)
    with hub_errors(name):
        revision = current_commit(source)

        def open_from(row: int) -> Iterator[Mapping[str, Any]]:
            data = stream_split(name, source, revision)
            return iter(dataset_rows(name, data.skip(row) if row else data, columns))

        yield from numbered_rows(f"hub:{name}", resume_on_error(open_from))


def resume_on_error(open_from: Callable[[int], Iterator[T]]) -> Iterator[T]:
    """Read a stream that goes on where it was when reading fails for a reason that may pass.

    Args:
        open_from: Opens the stream at the row with this number.

    Raises:
        Exception: what the stream raised, if that can't pass, or has come again and again.
    """
    read, stream = 0, None
    end = object()

    def pull() -> Any:
        nonlocal stream
        try:
            stream = stream or open_from(read)
            return next(stream, end)
        except Exception:
            stream = None  # a stream that raised is over
            raise

    while (row := retry(pull)) is not end:
        read += 1
        yield row
