"""The recipe's `[prompts]`, and where tables and prompt sets come from; see `recipe/recipe.py`."""

import re
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from ray_abliterate.recipe.section import Section

SPLIT = re.compile(r"^(?P<name>[\w.\-]*)(\[(?P<start>\d*):(?P<stop>\d*)\])?$")


class TableSource(Section):
    """The source of a table's rows; give exactly one of the first four settings."""

    builtin: str | None = None
    """Name of a set that ships with the package."""
    file: str | None = None
    """A `.jsonl`, `.csv` or `.parquet` file; for prompts also `.txt` (one prompt per line)."""
    folder: str | None = None
    """A folder saved by the `datasets` library."""
    dataset: str | None = None
    """A data set on the Hugging Face Hub; it is streamed, never downloaded whole."""
    config: str | None = None
    """Configuration (subset) of the Hub data set."""
    revision: str | None = None
    """Commit, tag or branch of the Hub data set."""
    split: str = ""
    """Split and slice, such as `train[:400]`; for files the slice alone, such as `[:400]`."""

    @field_validator("split")
    @classmethod
    def _split_is_readable(cls, value: str) -> str:
        match = SPLIT.match(value)
        if match is None:
            raise ValueError(f"{value!r} is not a split; write `train[:400]`, `[10:60]` or `test`")
        start, stop = (match["start"] or "0"), match["stop"]
        if stop and int(stop) <= int(start):
            raise ValueError(f"{value!r} selects nothing: {stop} is not above {start}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [k for k in ("builtin", "file", "folder", "dataset") if getattr(self, k)]
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of builtin, file, folder, dataset; found {names}")
        unused = [k for k in ("config", "revision") if getattr(self, k)] if not self.dataset else []
        if unused:
            raise ValueError(f"`{unused[0]}` is for Hub data sets only; leave it out")
        return self

    @property
    def split_name(self) -> str:
        """The split's name without its slice; empty if none is named."""
        match = SPLIT.match(self.split)
        return match["name"] if match else ""

    @property
    def bounds(self) -> tuple[int, int | None]:
        """The first row, and the row after the last (None: to the end)."""
        match = SPLIT.match(self.split)
        if match is None:
            return 0, None
        return int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


class PromptSource(TableSource):
    """The source of one set of prompts; give exactly one of the first four settings."""

    column: str | None = None
    """Column that holds the prompts; not for text files."""
    prefix: str = ""
    """Text before every prompt."""
    suffix: str = ""
    """Text after every prompt."""
    system: str | None = None
    """System prompt of this set; the chat template's default if unset."""
    deduplicate: bool = True
    """Drop repeated prompts except the first; `pca-paired` keeps them, with their partners."""

    @model_validator(mode="after")
    def _has_a_column(self) -> Self:
        if self.file and Path(self.file).suffix != ".txt" and self.column is None:
            raise ValueError(f"set `column`, the column of {self.file} that holds the prompts")
        if self.column and (self.builtin or (self.file or "").endswith(".txt")):
            raise ValueError("`column` is for tables; a text file has one prompt per line")
        if (self.folder or self.dataset) and self.column is None:
            raise ValueError("set `column`, the column that holds the prompts")
        return self


class PromptSettings(Section):
    """The two prompt sets from which the direction is extracted."""

    behaviour: PromptSource
    """Prompts that show the behaviour."""
    neutral: PromptSource
    """Prompts that do not show it."""
    filter_by_behaviour: bool = False
    """Let the base model answer both sets once, and drop prompts whose answer contradicts their
    set. The recipe's first `keyword-rate` or `refusal-judge` judges the answers; without one, its
    first `refusal-log-odds` does."""
    least_prompts: int = Field(16, ge=1)
    """With `filter_by_behaviour`: the run ends with an error if a set keeps fewer prompts."""
