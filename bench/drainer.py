"""A worker without a model: claims, reads and writes one fixed vector, beats; times its claims."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from bench.big_table import unit_vectors
from listener import queries
from listener.config import Settings
from listener.database import Connection, connect
from listener.queue import Queue
from listener.worker import BEAT_SECONDS, beat

CLAIM_EVENTS = Settings().batch_events
_MODEL = "bench/none"
_IDLE_SECONDS = 0.02


@dataclass
class Claims:
    """Milliseconds of each claim, in order, and how many events they brought in all."""

    milliseconds: list[float] = field(default_factory=list)
    events: int = 0

    def quantile(self, percent: float, begin: float = 0.0, end: float = 1.0) -> float:
        """Of the claims from one share of them to another. A value that was measured."""
        count = len(self.milliseconds)
        part = self.milliseconds[int(count * begin) : max(int(count * end), 1)]
        return float(np.percentile(part, percent, method="higher"))


class Drainer:
    """On one connection with the settings of the service's own."""

    def __init__(self, conn: Connection, settings: Settings) -> None:
        self._conn = conn
        self._queue = Queue(conn, settings, None)
        self._next_beat = time.monotonic()
        self._vector = unit_vectors(1)[0]

    def drain_for(self, seconds: float) -> Claims:
        """Whatever is there, for this long."""
        claims, deadline = Claims(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self._step(claims):
                time.sleep(_IDLE_SECONDS)
        return claims

    def drain(self) -> Claims:
        """Until nothing is left."""
        claims = Claims()
        while self._step(claims):
            pass
        # The last one found nothing.
        claims.milliseconds.pop()
        return claims

    def _step(self, claims: Claims) -> int:
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_SECONDS
            beat(self._conn, None)
        began = time.perf_counter()
        claim = self._queue.claim(CLAIM_EVENTS)
        claims.milliseconds.append((time.perf_counter() - began) * 1000)
        if claim is None:
            return 0
        events = self._queue.read(claim)
        self._queue.write(claim.lease, events, [self._vector] * len(events), _MODEL)
        claims.events += len(claim.event_ids)
        return len(claim.event_ids)


@contextmanager
def running_drainer(url: str) -> Iterator[Drainer]:
    """A drainer on a connection of its own."""
    settings = Settings(database_url=url)
    with connect(settings, "bench-work", as_service=True) as conn:
        conn.execute(queries.SERVICE_SESSION)
        yield Drainer(conn, settings)
