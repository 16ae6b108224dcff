"""Losses of single tokens, streamed to an Arrow file: one record batch for each chunk.

The file is an Arrow stream (`pyarrow.ipc.open_stream`) of `position`, `token` and `loss`, written
batch by batch, so that an evaluation that goes on cuts it where the saved one was and appends.
"""

import os
from pathlib import Path
from typing import Any

import pyarrow
from torch import Tensor

from ray_abliterate.errors import EvaluationChanged

SCHEMA = pyarrow.schema(
    [("position", pyarrow.int64()), ("token", pyarrow.int32()), ("loss", pyarrow.float32())]
)
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Ends an Arrow stream."""


class TokenLosses:
    """An Arrow file that grows by chunks."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """
        Args:
            path: The file.
            size: Bytes that are kept of it; 0 begins anew.

        Raises:
            EvaluationChanged: it is shorter than that.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.stat().st_size if path.exists() else 0
        if known < size:
            raise EvaluationChanged(
                f"token_losses = {str(path)!r} has {known} bytes, and {size} were written.\n"
                "  Put the file back, or delete the saved state to begin anew."
            )
        self._file: Any = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._file.write(SCHEMA.serialize())

    def append(self, start: int, tokens: Tensor, losses: Tensor) -> None:
        """One chunk: tokens from position `start` on, and the loss of each."""
        columns = [range(start, start + len(tokens)), tokens.numpy(), losses.numpy()]
        arrays = [pyarrow.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        self._file.write(pyarrow.record_batch(arrays, SCHEMA).serialize())

    def flush(self) -> int:
        """Bring it to disk; its size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return int(self._file.tell())

    def close(self, whole: bool = False) -> None:
        """Close it, with the mark of the end if the text has ended."""
        if whole:
            self._file.write(END)
        self._file.close()
