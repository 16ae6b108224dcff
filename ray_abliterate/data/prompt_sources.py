"""Where prompts come from: text files, tables, saved data sets, the Hub.

The one module that reads prompts; what it hands on is a `PromptSet`. `data/tables.py` reads whole
rows with what is here. Knows nothing about models.
"""

import difflib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from ray_abliterate.data.hub import advice_for, first_line, retry
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe import PromptSource, TableSource

log = logging.getLogger(__name__)

CSV_BLOCK = 1 << 24
"""Bytes of a CSV file that are parsed at once; no row may be longer."""


def load_prompt_set(name: str, source: PromptSource, base: Path, pairs: bool = False) -> PromptSet:
    """Read the prompts that a recipe names.

    Lines of a text file are stripped; cells of a table stay as they are. A slice counts the
    non-blank lines of a text file and the rows of a table. Nothing behind its end is read.

    Args:
        name: What the set is called, in errors and in `PromptSet.name`.
        source: Where the prompts are, and what is put around them.
        base: The recipe's folder; relative paths are looked up there, then in the working folder.
        pairs: Prompts have partners at the same place of another set, so none is dropped.

    Raises:
        PromptSourceError: nothing usable is there; says what was found and what to change.
    """
    try:
        origin, rows, seen = _read(source, base)
        texts = _usable(name, origin, rows, seen)
    except PromptSourceError as error:
        raise PromptSourceError(f"prompts {name!r}: {error}") from None
    if seen < (stop := source.bounds[1] or 0):
        log.warning("prompts %r: the slice ends at %d, but %s has %d", name, stop, origin, seen)
    if source.deduplicate and not pairs:
        texts = _unique(name, texts)
    prompts = (Prompt(source.prefix + text + source.suffix, source.system) for text in texts)
    return PromptSet(name, tuple(prompts), origin)


def warn_on_overlap(extraction: Sequence[PromptSet], evaluation: Sequence[PromptSet]) -> list[str]:
    """Say which prompts are scored although the direction was extracted from them.

    Returns one sentence for each pair of sets that share prompts; each is logged too.
    """
    sentences = [
        f"{shared} of {len(scored)} prompts of {scored.name!r} ({shared / len(scored):.0%}) are "
        f"in {known.name!r} too; their scores say little about prompts that the edit has not seen."
        for known in extraction
        for scored in evaluation
        if (shared := len(scored.overlap(known)))
    ]
    for sentence in sentences:
        log.warning("%s", sentence)
    return sentences


def _usable(name: str, origin: str, rows: Sequence[Any], seen: int) -> list[str]:
    """The rows that can be prompts, in order."""
    texts = [row for row in rows if _is_text(row)]
    unusable = len(rows) - len(texts)
    if not rows:
        raise PromptSourceError(f"{origin} selects nothing: there are {seen} rows. Check `split`.")
    if not texts:
        kinds = ", ".join(sorted({type(row).__name__ for row in rows}))
        raise PromptSourceError(
            f"{origin}: all {unusable} rows are null, blank or not text ({kinds}). Check `column`."
        )
    if unusable:
        counts = f"{unusable} of {len(rows)} rows of {origin}"
        log.warning("prompts %r: %s are null, blank or not text; skipped", name, counts)
    return texts


def _is_text(row: Any) -> bool:
    # Half of a surrogate pair, which JSON can hold, is nothing that a tokenizer takes.
    whole = isinstance(row, str) and not any("\ud800" <= c <= "\udfff" for c in row)
    return whole and bool(row.strip())


def _unique(name: str, texts: list[str]) -> list[str]:
    """The first of every text, outer blanks aside."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.strip(), text)
    if len(first) < len(texts):
        log.info("prompts %r: %d repeated prompts dropped", name, len(texts) - len(first))
    return list(first.values())


def _read(source: PromptSource, base: Path) -> tuple[str, list[Any], int]:
    """Origin, the slice's rows, and how many rows there are up to its end."""
    if source.dataset:
        folder = find(source.dataset, base)
        if folder is None or not folder.is_dir():
            return _read_hub(source)
        return _read_folder(folder, source)
    if source.folder:
        folder = existing(source.folder, base)
        if not is_saved(folder):
            raise PromptSourceError(f"{folder} was not saved by `datasets`; set `dataset` instead.")
        return _read_folder(folder, source)
    if source.split_name:
        raise PromptSourceError(f"a file has no split {source.split_name!r}; write only `[:400]`.")
    if source.builtin:
        rows = _lines(_builtin(source.builtin))
        return _origin(f"builtin:{source.builtin}", source), *_cut(rows, source)
    path = existing(str(source.file), base)
    return _origin(f"file:{path}", source), *_cut(_file(path, str(source.column)), source)


def _cut(rows: Iterable[Any], source: PromptSource) -> tuple[list[Any], int]:
    """The slice, and how many rows there were up to its end; not one more is pulled."""
    start, stop = source.bounds
    seen = list(islice(rows, stop))
    return seen[start:], len(seen)


def _origin(place: str, source: PromptSource) -> str:
    config = f"config={source.config}" if source.config else ""
    return " ".join(part for part in (place, config, source.split, source.column) if part)


def find(given: str, base: Path) -> Path | None:
    """A file or folder beside the recipe, or in the working folder."""
    places = (root / Path(given).expanduser() for root in (base, Path.cwd()))
    return next((place for place in places if place.exists()), None)


def existing(given: str, base: Path) -> Path:
    """The same; an error if there is none."""
    found = find(given, base)
    if found is None:
        raise PromptSourceError(f"{given} is neither in {base.absolute()} nor in {Path.cwd()}.")
    return found


def _builtin(name: str) -> Path:
    from ray_abliterate.data.builtin.demo_model import prompt_file

    try:
        return prompt_file(name)
    except ValueError as error:
        raise PromptSourceError(str(error)) from None


def _column(place: object, rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[Any]:
    """One column of rows that may lack it here and there, but not in the first."""
    for number, row in enumerate(rows):
        if number == 0:
            refuse_unknown(place, column, row)
        yield row.get(column)


def refuse_unknown(place: object, column: str, known: Iterable[str]) -> None:
    """Say which columns there are, if this is none of them."""
    names = list(known)
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PromptSourceError(f"{place} has no column {column!r}.{hint} It has: {names}.")


def _file(path: Path, column: str) -> Iterator[Any]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    ending = path.suffix.lower()
    if not path.is_file() or ending not in (".txt", *readers):
        raise PromptSourceError(f"{path} is not a file that ends in .txt, {', '.join(readers)}.")
    return _lines(path) if ending == ".txt" else readers[ending](path, column)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong in reading a file becomes an error that names it."""
    try:
        yield
    except UnicodeDecodeError:
        raise PromptSourceError(f"{path} is not UTF-8 text; convert it first.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptSourceError(f"{path} cannot be read: {first_line(error)}") from None


def _lines(path: Path) -> Iterator[str]:
    """Non-blank lines, stripped."""
    with readable(path), path.open(encoding="utf-8-sig") as file:
        yield from (line.strip() for line in file if line.strip())


def _jsonl(path: Path, column: str) -> Iterator[Any]:
    return _column(path, objects(path), column)


def objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSONL file, blank lines left out."""
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PromptSourceError(f"{path}: row {number} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise PromptSourceError(f"{path}: row {number} is not a JSON object: {line[:60]}")
        yield row


def _csv(path: Path, column: str) -> Iterator[Any]:
    from pyarrow import csv, string

    with readable(path):
        read, parse = (
            csv.ReadOptions(block_size=CSV_BLOCK),
            csv.ParseOptions(newlines_in_values=True),
        )
        with csv.open_csv(path, read, parse) as table:
            refuse_unknown(path, column, table.schema.names)
        only = csv.ConvertOptions(include_columns=[column], column_types={column: string()})
        with csv.open_csv(path, read, parse, only) as table:
            for batch in table:
                yield from batch.column(0).to_pylist()


def _parquet(path: Path, column: str) -> Iterator[Any]:
    from pyarrow import parquet

    with readable(path), parquet.ParquetFile(path) as table:
        refuse_unknown(path, column, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from batch.column(0).to_pylist()


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _read_folder(folder: Path, source: PromptSource) -> tuple[str, list[Any], int]:
    """What `datasets` saved; otherwise data files, as a downloaded Hub data set has them."""
    with readable(folder):
        rows = (_saved if is_saved(folder) else _stream)(str(folder), source)
        return _origin(f"folder:{folder}", source), *_cut(rows, source)


def _saved(folder: str, source: PromptSource) -> Iterator[Any]:
    import datasets

    data = datasets.load_from_disk(folder)
    if not isinstance(data, dict) and source.split_name not in ("", str(data.split)):
        raise PromptSourceError(
            f"{folder} holds one data set, no split {source.split_name!r}; write only `[:400]`."
        )
    return _cells(folder, one_split(folder, data, source).with_format(None), source)


def _stream(name: str, source: PromptSource, revision: str | None = None) -> Iterator[Any]:
    import datasets

    split = source.split_name or None
    data = datasets.load_dataset(
        name, source.config, split=split, revision=revision, streaming=True
    )
    return _cells(name, one_split(name, data, source), source)


def one_split(place: object, data: Any, source: TableSource) -> Any:
    """The split that is asked for, or the only one there is."""
    if not isinstance(data, dict):
        return data
    name = source.split_name or (next(iter(data)) if len(data) == 1 else "")
    if name not in data:
        found = f"has no split {name!r}" if name else "has several splits"
        raise PromptSourceError(f"{place} {found}.\n  Set `split` to one of: {', '.join(data)}.")
    return data[name]


def _cells(place: object, data: Any, source: PromptSource) -> Iterator[Any]:
    """One column of a data set; the others are not decoded where their names are known."""
    column = str(source.column)
    if data.column_names is not None:
        refuse_unknown(place, column, data.column_names)
        data = data.select_columns([column])
    return _column(place, data, column)


def _read_hub(source: PromptSource) -> tuple[str, list[Any], int]:
    name = str(source.dataset)
    with hub_advice(name):
        revision = commit_of(source)
        rows, seen = retry(lambda: _cut(_stream(name, source, revision), source))
    return _origin(f"hub:{name}@{revision}", source), rows, seen


def commit_of(source: TableSource) -> str:
    """The commit that a Hub data set is at now."""
    from huggingface_hub import HfApi

    name = str(source.dataset)
    info = retry(lambda: HfApi().dataset_info(name, revision=source.revision, timeout=30.0))
    return str(info.sha)


@contextmanager
def hub_advice(name: str) -> Iterator[None]:
    """What goes wrong with a Hub data set becomes an error that says what to do."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        advice = advice_for(error, name)
        raise PromptSourceError(f"hub:{name}: {first_line(error)}\n  {advice}") from None
