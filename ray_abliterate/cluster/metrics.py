"""Numbers for Ray's dashboard and Prometheus; all names begin with `abliterate_`."""

import time

from ray.util.metrics import Counter, Gauge

WINDOW_SECONDS = 10.0
"""Rates are averages over at least so long."""


class PoolMetrics:
    """What the pool knows: trials, tokens, and how busy replicas are."""

    def __init__(self, role: str) -> None:
        """Begin at zero.

        Args:
            role: The tag of all values: `replica` or `evaluator`.
        """
        self._done = Counter("abliterate_trials_done", "Trials that ended with scores.")
        self._failed = Counter("abliterate_trials_failed", "Trials that ended with an error.")
        self._pruned = Counter(
            "abliterate_trials_bounded", "Trials stopped once a finished one was better."
        )
        self._moved = Counter(
            "abliterate_calls_moved",
            "Calls given to another replica because theirs died.",
            ("role",),
        )
        self._tokens = Counter("abliterate_tokens", "Tokens of answers written in trials.")
        self._per_hour = Gauge("abliterate_trials_per_hour", "Over the last ten seconds or so.")
        self._per_second = Gauge("abliterate_tokens_per_second", "Over the last ten seconds or so.")
        self._ready = Gauge("abliterate_replicas_ready", "Those that can be used now.", ("role",))
        self._busy = Gauge(
            "abliterate_replica_busy_fraction",
            "Share of the time that ready replicas computed.",
            ("role",),
        )
        for metric in (self._moved, self._ready, self._busy):
            metric.set_default_tags({"role": role})
        self._running = 0
        self._window = _Window()

    def work_began(self) -> None:
        """Count one more replica as busy."""
        self._window.advance(self._running)
        self._running += 1

    def work_ended(self) -> None:
        """Count one replica less as busy: it has done its work, or died over it."""
        self._window.advance(self._running)
        self._running -= 1

    def call_moved(self) -> None:
        """Count a call that went to another replica."""
        self._moved.inc()

    def trial_scored(self, tokens: int, pruned: bool) -> None:
        """Count a trial that ended with scores.

        Args:
            tokens: Tokens of answers that were generated for it.
            pruned: Whether it was stopped early.
        """
        self._done.inc()
        if pruned:
            self._pruned.inc()
        if tokens:
            self._tokens.inc(tokens)
        self._window.trials += 1
        self._window.tokens += tokens

    def trial_failed(self) -> None:
        """Count a trial that ended with an error."""
        self._failed.inc()

    def publish(self, ready: int) -> None:
        """Bring the gauges up to date.

        Args:
            ready: Replicas that can be used now.
        """
        self._ready.set(ready)
        self._window.advance(self._running)
        if self._window.seconds < WINDOW_SECONDS:
            return
        full, self._window = self._window, _Window()
        self._per_hour.set(3600 * full.trials / full.seconds)
        self._per_second.set(full.tokens / full.seconds)
        self._busy.set(min(1.0, full.busy_seconds / (full.seconds * max(ready, 1))))


class _Window:
    """Sums over some seconds, from its construction on."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.trials = 0
        self.tokens = 0
        self.busy_seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._last - self._began

    def advance(self, running: int) -> None:
        """Add the time since the last call, in which so many replicas computed."""
        now = time.monotonic()
        self.busy_seconds += running * (now - self._last)
        self._last = now


class SearchMetrics:
    """What the driver knows about the search."""

    def __init__(self) -> None:
        self._hypervolume = Gauge(
            "abliterate_hypervolume",
            "Of the frontier; the far corner is the base model's scores, 1 where they are 0.",
        )

    def frontier(self, hypervolume: float) -> None:
        """Publish the hypervolume of the current frontier."""
        self._hypervolume.set(hypervolume)
