"""Losses of single tokens, streamed to an Arrow file: one record batch for each chunk.

The file is an Arrow stream (`pyarrow.ipc.open_stream`) of `position`, `token` and `loss`. It is
written batch by batch, so that an evaluation that resumes can truncate it to what its saved state
knows, and append.
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
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The bytes that end an Arrow stream."""


class TokenLosses:
    """An Arrow file to which the token losses of one chunk after another are appended."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """
        Args:
            path: The file.
            size: Bytes of it that are still valid; 0 begins anew.

        Raises:
            EvaluationChanged: the file is shorter than `size`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        existing = path.stat().st_size if path.exists() else 0
        if existing < size:
            raise EvaluationChanged(
                f"token_losses = {str(path)!r} has {existing} bytes, but {size} were written.\n"
                "  Put the file back, or delete the saved state to begin anew."
            )
        self._file: Any = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._file.write(SCHEMA.serialize())

    def append(self, start: int, tokens: Tensor, losses: Tensor) -> None:
        """Append one chunk: tokens from position `start` on, and the loss of each."""
        columns = [range(start, start + len(tokens)), tokens.numpy(), losses.numpy()]
        arrays = [pyarrow.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        self._file.write(pyarrow.record_batch(arrays, SCHEMA).serialize())

    def flush(self) -> int:
        """Bring the file to disk, and return its size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return int(self._file.tell())

    def close(self, complete: bool = False) -> None:
        """Close the file, with the end-of-stream marker if the text is `complete`."""
        if complete:
            self._file.write(END_OF_STREAM)
        self._file.close()
