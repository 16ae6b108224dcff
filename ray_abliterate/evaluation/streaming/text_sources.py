"""Texts that become tokens while they are read: files, columns of tables, data sets of the Hub.

A text is tokenized piece by piece, so that it never has to be in memory: a file in pieces of about
64 kB that end where a line ends, a table or data set row by row, with the tokenizer's end token
after each row. At the edge of two pieces of a file, a tokenizer may cut words otherwise than it
would in the whole text.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_abliterate.data.hub import advice_for, first_line, retry
from ray_abliterate.errors import TokenSourceError
from ray_abliterate.evaluation.streaming.token_sources import SAMPLE, TokenSource, skip_tokens

PIECE = 1 << 16
"""Characters that are tokenized at once."""
IDS_AT_ONCE, ROWS_AT_ONCE = 1 << 16, 64
"""Rows of a Parquet file: of one id each, and of whole documents."""
TABLES = (".parquet", ".arrow", ".feather")
COLUMNS = ("tokens", "input_ids", "text")


class TextPieces(Protocol):
    """Pieces of text.

    Attributes:
        name: What it is called in errors.
        rows: Pieces are documents of their own.
    """

    name: str
    rows: bool

    def pieces(self, column: str | None) -> Iterator[Any]:
        """Texts, or lists of ids."""

    def facts(self) -> bytes:
        """What tells it from others."""


class TextSource:
    """Tokens of texts, or of rows that hold ids already."""

    def __init__(self, texts: TextPieces, tokenizer: Any, column: str | None) -> None:
        self.name = texts.name
        self.length: int | None = None
        self._texts, self._tokenizer, self._column = texts, tokenizer, column
        template = getattr(tokenizer, "name_or_path", ""), getattr(tokenizer, "vocab_size", 0)
        digest = hashlib.sha256(texts.facts() + repr((template, column)).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Token ids; what lies before `start` is tokenized and dropped."""
        return skip_tokens(self._all(), start)

    def _all(self) -> Iterator[Tensor]:
        end = getattr(self._tokenizer, "eos_token_id", None)
        for piece in self._texts.pieces(self._column):
            if not isinstance(piece, str):
                yield self._ids(piece)
                continue
            ids = require_tokenizer(self._tokenizer, self.name).encode(
                piece, add_special_tokens=False
            )
            close = [end] if self._texts.rows and end is not None else []
            yield torch.tensor([*ids, *close], dtype=torch.int64)

    def _ids(self, piece: Any) -> Tensor:
        try:
            return torch.as_tensor(piece, dtype=torch.int64).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise TokenSourceError(
                f"{self.name}: a row holds {type(piece).__name__}, neither text nor token ids.\n"
                "  Set column to one that does."
            ) from None


def require_tokenizer(tokenizer: Any, name: str) -> Any:
    """The tokenizer, which a text can't do without."""
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
        """About 64 kB each, cut after the end of a line; a longer line is cut where it must be."""
        held = ""
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            while text := self._read(file):
                held += text
                cut = held.rfind("\n") + 1
                if cut or len(held) > 8 * PIECE:
                    cut = cut or len(held)
                    yield held[:cut]
                    held = held[cut:]
        if held:
            yield held

    def _read(self, file: Any) -> str:
        try:
            text: str = file.read(PIECE)
        except UnicodeDecodeError:
            raise TokenSourceError(f"{self.name} is not UTF-8 text; convert it first.") from None
        return text

    def facts(self) -> bytes:
        """Size, and both ends."""
        return file_facts(self._path)


class TableText:
    """A column of a Parquet file, or of an Arrow file."""

    rows = True

    def __init__(self, path: Path, column: str) -> None:
        self.name, self._path, self._column = str(path), path, column

    def pieces(self, column: str | None) -> Iterator[Any]:
        """Cell by cell; null cells are passed over. A column of ids comes batch by batch."""
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

    def facts(self) -> bytes:
        """Size, and both ends."""
        return file_facts(self._path)


class HubText:
    """A data set that is streamed from the Hub."""

    rows = True

    def __init__(self, name: str, split: str, config: str | None, revision: str | None) -> None:
        self.name, self._dataset = f"hub:{name}", name
        self._split, self._config, self._revision = split, config, revision

    def pieces(self, column: str | None) -> Iterator[Any]:
        """Cells of the column, as they arrive."""
        import datasets
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            data = retry(
                lambda: datasets.load_dataset(
                    self._dataset,
                    self._config,
                    split=self._split,
                    revision=self._revision,
                    streaming=True,
                )
            )
            for number, row in enumerate(data):
                chosen = column if number else (column := resolve_column(self.name, row, column))
                if row.get(chosen):
                    yield row[chosen]
        except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
            advice = advice_for(error, self._dataset)
            raise TokenSourceError(f"{self.name}: {first_line(error)}\n  {advice}") from None

    def facts(self) -> bytes:
        """Its name; pin `revision` for a text that can't change."""
        return repr((self._dataset, self._split, self._config, self._revision)).encode()


def open_table(path: Path, tokenizer: Any, column: str | None) -> TokenSource:
    """A column of a table; a tokenizer is asked for only if it holds text."""
    import pyarrow

    try:
        schema = _schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise TokenSourceError(f"{path} cannot be read: {first_line(error)}") from None
    chosen = resolve_column(str(path), schema.names, column)
    if "string" in str(schema.field(chosen).type):
        require_tokenizer(tokenizer, str(path))
    return TextSource(TableText(path, chosen), tokenizer, chosen)


def resolve_column(place: str, names: Any, column: str | None) -> str:
    """The column that is asked for, or the first usual name that is there."""
    found = column or next((name for name in COLUMNS if name in names), "")
    if found not in names:
        asked = f"no column {found!r}" if found else f"none of the columns {', '.join(COLUMNS)}"
        raise TokenSourceError(f"{place} has {asked}.\n  Set column to one of: {', '.join(names)}.")
    return found


def _schema(path: Path) -> Any:
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return parquet.read_schema(path)
    return next(iter(_readers(path))).schema


def _arrow_batches(path: Path) -> Iterator[Any]:
    for reader in _readers(path):
        if hasattr(reader, "num_record_batches"):
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader


def _readers(path: Path) -> Iterator[Any]:
    """The reader of an Arrow file, or of an Arrow stream."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            yield pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            yield pyarrow.ipc.open_stream(file)


def file_facts(path: Path) -> bytes:
    """Size of a file, and what both its ends hold."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(SAMPLE)
        file.seek(max(0, size - SAMPLE))
        return str(size).encode() + head + file.read(SAMPLE)
