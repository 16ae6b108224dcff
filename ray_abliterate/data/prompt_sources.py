"""Where prompts come from: text files, tables, saved data sets, the Hub.

The one module that reads prompts; what it returns is a `PromptSet`. `data/tables.py` reads whole
rows; both use `data/readers.py`. Knows nothing about models.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ray_abliterate.data.hub import retry
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.data.readers import (
    current_commit,
    dataset_rows,
    existing_path,
    file_errors,
    file_rows,
    find_path,
    hub_errors,
    is_saved_dataset,
    select_split,
    stream_split,
)
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe import PromptSource

log = logging.getLogger(__name__)


def load_prompt_set(name: str, source: PromptSource, base: Path, pairs: bool = False) -> PromptSet:
    """Read the prompts that a recipe names.

    Lines of a text file are stripped; cells of a table stay as they are. A slice counts the
    non-blank lines of a text file and the rows of a table. Nothing behind its end is read.

    Args:
        name: The set's name, for errors and for `PromptSet.name`.
        source: Where the prompts are, and what is put around them.
        base: The recipe's folder; relative paths are looked up there, then in the working folder.
        pairs: Whether prompts have partners at the same place of another set, so that none may be
            dropped.

    Raises:
        PromptSourceError: nothing usable is there; says what was found and what to change.
    """
    try:
        origin, rows, read = _read(source, base)
        texts = _usable(name, origin, rows, read)
    except PromptSourceError as error:
        raise PromptSourceError(f"prompts {name!r}: {error}") from None
    if read < (stop := source.bounds[1] or 0):
        log.warning("prompts %r: the slice ends at %d, but %s has %d", name, stop, origin, read)
    if source.deduplicate and not pairs:
        texts = _unique(name, texts)
    prompts = (Prompt(source.prefix + text + source.suffix, source.system) for text in texts)
    return PromptSet(name, tuple(prompts), origin)


def warn_on_overlap(extraction: Sequence[PromptSet], evaluation: Sequence[PromptSet]) -> list[str]:
    """Warn of prompts that are scored although the direction was extracted from them.

    Returns one sentence for each pair of sets that share prompts; each is logged too.
    """
    sentences = [
        f"{shared} of {len(scored)} prompts of {scored.name!r} ({shared / len(scored):.0%}) are "
        f"in {extracted.name!r} too; their scores say little about prompts that the edit has not "
        "seen."
        for extracted in extraction
        for scored in evaluation
        if (shared := len(scored.overlap(extracted)))
    ]
    for sentence in sentences:
        log.warning("%s", sentence)
    return sentences


def _usable(name: str, origin: str, rows: Sequence[Any], read: int) -> list[str]:
    """Return the rows that can be prompts, in order."""
    texts = [row for row in rows if _is_text(row)]
    unusable = len(rows) - len(texts)
    if not rows:
        raise PromptSourceError(f"{origin} selects nothing: there are {read} rows. Check `split`.")
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
    """Return the first of every text, outer blanks aside."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.strip(), text)
    if len(first) < len(texts):
        log.info("prompts %r: %d repeated prompts dropped", name, len(texts) - len(first))
    return list(first.values())


def _read(source: PromptSource, base: Path) -> tuple[str, list[Any], int]:
    """Return the origin, the slice's rows, and how many rows there are up to the slice's end."""
    if source.dataset:
        folder = find_path(source.dataset, base)
        if folder is None or not folder.is_dir():
            return _read_hub(source)
        return _read_folder(folder, source)
    if source.folder:
        folder = existing_path(source.folder, base)
        if not is_saved_dataset(folder):
            raise PromptSourceError(f"{folder} was not saved by `datasets`; set `dataset` instead.")
        return _read_folder(folder, source)
    if source.split_name:
        raise PromptSourceError(f"a file has no split {source.split_name!r}; write only `[:400]`.")
    if source.builtin:
        rows = _text_lines(_builtin_file(source.builtin))
        return _origin(f"builtin:{source.builtin}", source), *_slice(rows, source)
    path = existing_path(str(source.file), base)
    return _origin(f"file:{path}", source), *_slice(_file_texts(path, source), source)


def _slice(rows: Iterable[Any], source: PromptSource) -> tuple[list[Any], int]:
    """Return the slice, and how many rows there were up to its end; not one more is pulled."""
    start, stop = source.bounds
    read = list(islice(rows, stop))
    return read[start:], len(read)


def _origin(place: str, source: PromptSource) -> str:
    config = f"config={source.config}" if source.config else ""
    return " ".join(part for part in (place, config, source.split, source.column) if part)


def _builtin_file(name: str) -> Path:
    from ray_abliterate.data.builtin.demo_model import prompt_file

    try:
        return prompt_file(name)
    except ValueError as error:
        raise PromptSourceError(str(error)) from None


def _file_texts(path: Path, source: PromptSource) -> Iterator[Any]:
    if path.suffix.lower() == ".txt" and path.is_file():
        return _text_lines(path)
    column = str(source.column)
    return (row.values[column] for row in file_rows(path, [column], also=[".txt"]))


def _text_lines(path: Path) -> Iterator[str]:
    """Read the non-blank lines of a text file, stripped."""
    with file_errors(path), path.open(encoding="utf-8-sig") as file:
        yield from (line.strip() for line in file if line.strip())


def _read_folder(folder: Path, source: PromptSource) -> tuple[str, list[Any], int]:
    """Read what `datasets` saved; otherwise data files, as a downloaded Hub data set has them."""
    with file_errors(folder):
        if is_saved_dataset(folder):
            rows = _saved_cells(folder, source)
        else:
            rows = _streamed_cells(str(folder), source)
        return _origin(f"folder:{folder}", source), *_slice(rows, source)


def _saved_cells(folder: Path, source: PromptSource) -> Iterator[Any]:
    import datasets

    data = datasets.load_from_disk(str(folder))
    if not isinstance(data, dict) and source.split_name not in ("", str(data.split)):
        raise PromptSourceError(
            f"{folder} holds one data set, no split {source.split_name!r}; write only `[:400]`."
        )
    return _cells(folder, select_split(folder, data, source).with_format(None), source)


def _streamed_cells(name: str, source: PromptSource, revision: str | None = None) -> Iterator[Any]:
    return _cells(name, stream_split(name, source, revision), source)


def _cells(place: object, data: Any, source: PromptSource) -> Iterator[Any]:
    column = str(source.column)
    return (row[column] for row in dataset_rows(place, data, [column]))


def _read_hub(source: PromptSource) -> tuple[str, list[Any], int]:
    name = str(source.dataset)
    with hub_errors(name):
        revision = current_commit(source)
        rows, read = retry(lambda: _slice(_streamed_cells(name, source, revision), source))
    return _origin(f"hub:{name}@{revision}", source), rows, read
