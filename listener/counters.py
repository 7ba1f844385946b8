"""What this process has done since it started, counted; the metrics endpoint shows it.

Plain numbers, so that counting costs nothing where nobody asks. Each has one thread that writes it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_EVENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass
class Histogram:
    """How many values were at most each bound; the last of `counts` has those beyond them all."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class Counters:
    """All of them; the endpoint's table says what each means."""

    commit_to_vector: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    batch_events: Histogram = field(default_factory=lambda: Histogram(_EVENTS))
    events_stored: int = 0
    texts_encoded: int = 0
    texts_reused: int = 0
    texts_truncated: int = 0
    failed_attempts: int = 0
    lease_expiries: int = 0
    reconnects: int = 0

    def stored(self, seconds_since_change: Iterable[float | None]) -> None:
        """One value per event whose vector was stored; None for one of a backfill."""
        for seconds in seconds_since_change:
            self.events_stored += 1
            if seconds is not None:
                self.commit_to_vector.observe(seconds)

    def batch(self, events: int, encoded: int, reused: int) -> None:
        """One batch went through the model."""
        self.batch_events.observe(events)
        self.texts_encoded += encoded
        self.texts_reused += reused


counters = Counters()
