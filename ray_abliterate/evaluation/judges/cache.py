"""Caches judgements on disk, by what was judged and by whom.

Each has one small file, written atomically, so any number of processes may read and write them.
Nothing bounds the folder: delete it, or part of it, at any time. Knows nothing about how exchanges
are judged.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ray_abliterate.data.atomic_files import cache_root, write_atomically
from ray_abliterate.evaluation.judges.judge import Exchange, Judge

BATCH = 64
"""Judgements that are made before they are stored: as many are lost if the judge fails."""

log = logging.getLogger(__name__)


def default_judgement_folder() -> Path:
    """Return the folder of judgements in the user's cache folder."""
    return cache_root() / "judgements"


class CachedJudge:
    """A judge that is asked only once about each exchange, unless it could not decide on it."""

    def __init__(self, judge: Judge, folder: Path) -> None:
        """
        Args:
            judge: Judges what is not in the cache.
            folder: Where judgements are stored.
        """
        self._inner, self._folder = judge, folder
        self._warned = False

    @property
    def identity(self) -> str:
        """Return the identity of the judge behind the cache."""
        return self._inner.identity

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return cached judgements, and ask about the rest, once about equal exchanges."""
        files = {exchange: self._file(exchange) for exchange in exchanges}
        judgements = {exchange: self._read(file) for exchange, file in files.items()}
        missing = [exchange for exchange, judgement in judgements.items() if judgement is None]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            for exchange, judgement in zip(batch, self._inner.judge(batch), strict=True):
                judgements[exchange] = judgement
                if judgement is not None:
                    self._write(files[exchange], judgement)
        return [judgements[exchange] for exchange in exchanges]

    def _file(self, exchange: Exchange) -> Path:
        key = json.dumps([self.identity, *exchange], ensure_ascii=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:]}.json"

    def _read(self, file: Path) -> float | None:
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing or damaged: the judge is asked again
            return None
        is_probability = isinstance(value, float | int) and 0 <= value <= 1
        return float(value) if is_probability else None

    def _write(self, file: Path, judgement: float) -> None:
        try:
            write_atomically(file, json.dumps(judgement).encode())
        except OSError as error:
            if not self._warned:
                log.warning("judgements can't be stored in %s (%s)", self._folder, error.strerror)
            self._warned = True
