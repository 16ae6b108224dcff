"""Judgements that are kept on disk, by what was judged and by whom.

One small file for each, written whole, so any number of processes may read and write them. Nothing
bounds the folder: delete it, or part of it, at any time. Knows nothing about how is judged.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ray_abliterate.data.atomic_files import cache_root, write_whole
from ray_abliterate.evaluation.judges.judge import Exchange, Judge

KEPT_AT_ONCE = 64
"""Judgements after which all are kept; more are lost if the judge fails."""

log = logging.getLogger(__name__)


def default_judgement_folder() -> Path:
    """Where judgements are kept, in the user's cache folder."""
    return cache_root() / "judgements"


class CachedJudge:
    """A judge that is asked once about each exchange. What it couldn't tell it is asked again."""

    def __init__(self, judge: Judge, folder: Path) -> None:
        """
        Args:
            judge: Who is asked about what is not known.
            folder: Where judgements are kept.
        """
        self._inner, self._folder = judge, folder
        self._warned = False

    @property
    def identity(self) -> str:
        """The judge's own."""
        return self._inner.identity

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """See `Judge`; equal exchanges are one."""
        places = {exchange: self._place(exchange) for exchange in exchanges}
        known = {exchange: self._read(place) for exchange, place in places.items()}
        asked = [exchange for exchange, judgement in known.items() if judgement is None]
        for start in range(0, len(asked), KEPT_AT_ONCE):
            some = asked[start : start + KEPT_AT_ONCE]
            for exchange, judgement in zip(some, self._inner.judge(some), strict=True):
                known[exchange] = judgement
                if judgement is not None:
                    self._keep(places[exchange], judgement)
        return [known[exchange] for exchange in exchanges]

    def _place(self, exchange: Exchange) -> Path:
        key = json.dumps([self.identity, *exchange], ensure_ascii=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:]}.json"

    def _read(self, place: Path) -> float | None:
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or not whole: asked again
            return None
        sound = isinstance(found, float | int) and 0 <= found <= 1
        return float(found) if sound else None

    def _keep(self, place: Path, judgement: float) -> None:
        try:
            write_whole(place, json.dumps(judgement).encode())
        except OSError as error:
            if not self._warned:
                log.warning("judgements can't be kept in %s (%s)", self._folder, error.strerror)
            self._warned = True
