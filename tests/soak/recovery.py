"""How long events wait that came the moment before a fault."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from statistics import median

import psycopg

from tests.soak import statements
from tests.soak.ground import Ground

BURST_EVENTS = 200
LIMIT_SECONDS = 60.0
_LOOK_SECONDS = 0.02

_WAITING = b"""
select count(*)
from listener.waiting w
left join listener.queue q on q.event_id = w.event_id
where w.event_id = any(%(ids)s) and q.error is null
"""


@dataclass(frozen=True)
class Recovery:
    """One fault and the time until the last event of its burst had its vector.

    `seconds` None: not within the limit. `alone`: no lasting fault was under way.
    """

    kind: str
    seconds: float | None
    alone: bool


@dataclass
class Recoveries:
    """All that were measured."""

    measured: list[Recovery] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, recovery: Recovery) -> None:
        with self._lock:
            self.measured.append(recovery)

    def overdue(self) -> list[Recovery]:
        """Those that took longer than the harness waits."""
        return [recovery for recovery in self.measured if recovery.seconds is None]

    def seconds(self, kind: str | None = None, *, alone: bool | None = None) -> list[float]:
        """The measured times, of one kind or of all."""
        return [
            LIMIT_SECONDS if recovery.seconds is None else recovery.seconds
            for recovery in self.measured
            if kind in (None, recovery.kind) and alone in (None, recovery.alone)
        ]


def insert_burst(ground: Ground) -> list[int]:
    """More events than one claim takes, so that every worker is likely to have some in hand."""
    with ground.connect("soak-burst") as conn:
        return [row[0] for row in conn.execute(statements.INSERT, {"events": BURST_EVENTS})]


def seconds_to_recover(ground: Ground, ids: list[int], since: float) -> float | None:
    """From `since`, a time.monotonic(), until none of these events waits any more."""
    while time.monotonic() - since < LIMIT_SECONDS:
        try:
            with ground.connect("soak-recovery") as conn:
                while time.monotonic() - since < LIMIT_SECONDS:
                    row = conn.execute(_WAITING, {"ids": ids}).fetchone()
                    if row == (0,):
                        return time.monotonic() - since
                    time.sleep(_LOOK_SECONDS)
        except psycopg.OperationalError:
            # The server is away, or full.
            time.sleep(_LOOK_SECONDS)
    return None


def p50_and_max(seconds: list[float]) -> tuple[str, str]:
    """For a table; empty where nothing was measured."""
    if not seconds:
        return "", ""
    return f"{median(seconds):.2f}", f"{max(seconds):.2f}"
