"""Texts that become tokens while they are read: files, columns of tables, data sets of the Hub.

A text is tokenized piece by piece, so that it is never in memory as a whole: a file in pieces of
about 64 kB that end where a line ends, a table or data set row by row, with the tokenizer's end
token after each row. At the border of two pieces of a file, a tokenizer may split words differently
than it would in the whole text.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_abliterate.data.hub import dataset_advice, first_line, retry
from ray_abliterate.errors import TokenSourceError
from ray_abliterate.evaluation.streaming.token_sources import SAMPLE, TokenSource, skip_tokens

PIECE = 1 << 16
"""Characters that are tokenized at once."""
IDS_AT_ONCE, ROWS_AT_ONCE = 1 << 16, 64
"""Rows of a Parquet file that are read at once: rows of one id each, and rows of documents."""
TABLES = (".parquet", ".arrow", ".feather")
COLUMNS = ("tokens", "input_ids", "text")
"""Columns that are looked for, in this order, if none is named."""


class TextPieces(Protocol):
    """A text that can be read in pieces.

    Attributes:
        name: What errors call it.
        rows: Each piece is a document of its own.
    """

    name: str
    rows: bool

    def pieces(self, column: str | None) -> Iterator[Any]:
        """Yield texts, or lists of token ids."""

    def identity(self) -> bytes:
        """Return what distinguishes this text from others."""


class TextSource:
    """The tokens of a text, or of rows that hold token ids already."""

    def __init__(self, texts: TextPieces, tokenizer: Any, column: str | None) -> None:
        """
        Args:
            texts: The text, in pieces.
            tokenizer: Makes tokens of texts; None where all rows hold token ids.
            column: Column of a table or data set; the first usual one if None.
        """
        self.name = texts.name
        self.length: int | None = None
        self._texts, self._tokenizer, self._column = texts, tokenizer, column
        reading = getattr(tokenizer, "name_or_path", ""), getattr(tokenizer, "vocab_size", 0)
        digest = hashlib.sha256(texts.identity() + repr((reading, column)).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield token ids; what lies before `start` is tokenized and dropped."""
        return skip_tokens(self._all_blocks(), start)

    def _all_blocks(self) -> Iterator[Tensor]:
        end = getattr(self._tokenizer, "eos_token_id", None)
        for piece in self._texts.pieces(self._column):
            if not isinstance(piece, str):
                yield self._token_ids(piece)
                continue
            ids = require_tokenizer(self._tokenizer, self.name).encode(
                piece, add_special_tokens=False
            )
            end_of_row = [end] if self._texts.rows and end is not None else []
            yield torch.tensor([*ids, *end_of_row], dtype=torch.int64)

    def _token_ids(self, piece: Any) -> Tensor:
        try:
            return torch.as_tensor(piece, dtype=torch.int64).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise TokenSourceError(
                f"{self.name}: a row holds {type(piece).__name__}, neither text nor token ids.\n"
                "  Set column to one that does."
            ) from None


def require_tokenizer(tokenizer: Any, name: str) -> Any:
    """Return the tokenizer, without which a text cannot be read.

    Raises:
        TokenSourceError: it is None.
    """
    if tokenizer is None:
        raise TokenSourceError(
            f"source = {name!r} is text, and tokenizer is not set.\n"
            "  Give the model's tokenizer: open_source(…, tokenizer)."
        )
    return tokenizer


class TextFile:
    """A file of UTF-8 text."""

    rows = False

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path

    def pieces(self, column: str | None) -> Iterator[str]:
        """Yield about 64 kB at a time, cut after the end of a line.

        A line longer than eight such pieces is cut where it happens to be.

        Raises:
            TokenSourceError: the file is not UTF-8.
        """
        pending = ""
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            while text := self._read(file):
                pending += text
                cut = pending.rfind("\n") + 1
                if cut or len(pending) > 8 * PIECE:
                    cut = cut or len(pending)
                    yield pending[:cut]
                    pending = pending[cut:]
        if pending:
            yield pending

    def _read(self, file: Any) -> str:
        try:
            text: str = file.read(PIECE)
        except UnicodeDecodeError:
            raise TokenSourceError(f"{self.name} is not UTF-8 text; convert it first.") from None
        return text

    def identity(self) -> bytes:
        """Return the file's size and both its ends."""
        return _size_and_ends(self._path)


class TableText:
    """A column of a Parquet file, or of an Arrow file."""

    rows = True

    def __init__(self, path: Path, column: str) -> None:
        self.name, self._path, self._column = str(path), path, column

    def pieces(self, column: str | None) -> Iterator[Any]:
        """Yield cell by cell, without null cells; a column of ids comes batch by batch."""
        for batch in self._batches():
            values = batch.column(self._column)
            if str(values.type).startswith(("int", "uint")):
                yield values.drop_null().to_numpy(zero_copy_only=False).copy()
                continue
            yield from (cell for cell in values.to_pylist() if cell)

    def _batches(self) -> Iterator[Any]:
        if self._path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(self._path) as file:
                kind = str(file.schema_arrow.field(self._column).type)
                rows = IDS_AT_ONCE if kind.startswith(("int", "uint")) else ROWS_AT_ONCE
                yield from file.iter_batches(batch_size=rows, columns=[self._column])
            return
        yield from _arrow_batches(self._path)

    def identity(self) -> bytes:
        """Return the file's size and both its ends."""
        return _size_and_ends(self._path)


class HubText:
    """A data set that is streamed from the Hub."""

    rows = True

    def __init__(self, name: str, split: str, config: str | None, revision: str | None) -> None:
        self.name, self._dataset = f"hub:{name}", name
        self._split, self._config, self._revision = split, config, revision

    def pieces(self, column: str | None) -> Iterator[Any]:
        """Yield cells of the column as they arrive.

        Raises:
            TokenSourceError: the data set cannot be read, or has no such column.
        """
        import datasets
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            rows = retry(
                lambda: datasets.load_dataset(
                    self._dataset,
                    self._config,
                    split=self._split,
                    revision=self._revision,
                    streaming=True,
                )
            )
            for number, row in enumerate(rows):
                chosen = column if number else (column := resolve_column(self.name, row, column))
                if row.get(chosen):
                    yield row[chosen]
        except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
            advice = dataset_advice(error, self._dataset)
            raise TokenSourceError(f"{self.name}: {first_line(error)}\n  {advice}") from None

    def identity(self) -> bytes:
        """Return what the data set is called; only with `revision` is its content fixed."""
        return repr((self._dataset, self._split, self._config, self._revision)).encode()


def open_table(path: Path, tokenizer: Any, column: str | None) -> TokenSource:
    """Open a column of a table; a tokenizer is needed only if it holds text.

    Raises:
        TokenSourceError: the file is no table, lacks the column, or needs a tokenizer.
    """
    import pyarrow

    try:
        schema = _schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise TokenSourceError(f"{path} cannot be read: {first_line(error)}") from None
    chosen = resolve_column(str(path), schema.names, column)
    if "string" in str(schema.field(chosen).type):
        require_tokenizer(tokenizer, str(path))
    return TextSource(TableText(path, chosen), tokenizer, chosen)


def resolve_column(source: str, names: Any, column: str | None) -> str:
    """Return the column that is asked for, or the first of `COLUMNS` that exists.

    Raises:
        TokenSourceError: there is no such column.
    """
    chosen = column or next((name for name in COLUMNS if name in names), "")
    if chosen not in names:
        asked = f"no column {chosen!r}" if chosen else f"none of the columns {', '.join(COLUMNS)}"
        raise TokenSourceError(
            f"{source} has {asked}.\n  Set column to one of: {', '.join(names)}."
        )
    return chosen


def _schema(path: Path) -> Any:
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return parquet.read_schema(path)
    return next(iter(_arrow_readers(path))).schema


def _arrow_batches(path: Path) -> Iterator[Any]:
    for reader in _arrow_readers(path):
        if hasattr(reader, "num_record_batches"):
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader


def _arrow_readers(path: Path) -> Iterator[Any]:
    """Yield the one reader of an Arrow file, or of an Arrow stream, while the file is mapped."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            yield pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            yield pyarrow.ipc.open_stream(file)


def _size_and_ends(path: Path) -> bytes:
    """Return the size of a file, and `SAMPLE` bytes from both its ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(SAMPLE)
        file.seek(max(0, size - SAMPLE))
        return str(size).encode() + head + file.read(SAMPLE)
