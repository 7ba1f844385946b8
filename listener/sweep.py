"""The sweep of the last N events, page by page, at start-up and on its timer."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import psycopg
from psycopg.errors import LockNotAvailable

from listener.config import Settings
from listener.database import Connection, cause_of
from listener.errors import ConnectionLost, StatementTimeout
from listener.logs import log
from listener.queue import Queue
from listener.upkeep import discard_parked

# New events wait while a page is swept, so pages are short. But where even a page of one event is
# slow (all events are sorted for each), a page may take twice as long as that, or there would be no
# end.
_PAGE, _PAGE_SECONDS, _TIMES_THE_LEAST = 500, 0.25, 2


@dataclass
class _UnderWay:
    """One sweep: how many events are left, from which position on, and how its pages do."""

    left: int
    start: str | None = None
    # From one event on by doubling, so that what such a page takes is known.
    page_events: int = 1
    least_seconds: float = math.inf
    is_blind: bool = False


class Sweep:
    """Where the sweep stands. Outlives a connection, which one of its events may be what breaks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._current = _UnderWay(settings.backfill_last_n)
        self._next_at = time.monotonic() if settings.backfill_last_n else float("inf")
        # Why the last one was given up, if it was.
        self.failure: str | None = None

    def seconds_left(self) -> float:
        """Until it begins; 0 or less while it is under way."""
        return self._next_at - time.monotonic()

    def page(self, conn: Connection, queue: Queue, model: str) -> bool:
        """Queue one page of the last N, if it is time to. Returns whether there is more to do.

        A page at a time, so that live events never wait behind a long sweep and the queue stays
        short. One that fails, takes too long or loses the connection is tried again by halves, and
        one event alone is queued blindly: the worker finds out what it has to do with it.
        """
        if self.seconds_left() > 0:
            return False
        queued, events = 0, min(self._current.page_events, self._current.left)
        try:
            queued = self._queue_page(queue, model, events)
        except (ConnectionLost, psycopg.Error) as error:
            if isinstance(error.__cause__, LockNotAvailable):
                # No event's fault: a smaller page would wait as long.
                raise
            self._make_smaller(events, queue.has_session, error)
            if isinstance(error, ConnectionLost) and not isinstance(error, StatementTimeout):
                raise
        if self.seconds_left() > 0:
            discard_parked(conn)
        return queued > 0 or self.seconds_left() <= 0

    def _make_smaller(self, events: int, may_be_blind: bool, error: Exception) -> None:
        self._current.page_events = max(events // 2, 1)
        is_last = events == 1 and (self._current.is_blind or not may_be_blind)
        if is_last:
            # To begin anew at once would fail again.
            last, cause = self._settings.backfill_last_n, cause_of(error)
            scanned = last - self._current.left
            log(logging.WARNING, "sweep_given_up", scanned=scanned, cause=cause)
            self._schedule()
            self.failure = f"after {scanned} of the last {last} events ({cause})"
        self._current.is_blind = events == 1 and not is_last

    def _queue_page(self, queue: Queue, model: str, events: int) -> int:
        current, began = self._current, time.monotonic()
        page = queue.sweep(None if current.is_blind else model, current.start, events)
        current.is_blind = False
        took = max(time.monotonic() - began, 1e-3)
        current.least_seconds = min(current.least_seconds, took)
        seconds = max(_PAGE_SECONDS, _TIMES_THE_LEAST * current.least_seconds)
        fitting = int(events * seconds / took)
        # By doubling, or an event that was just found to be too much would be met in a full page.
        current.page_events = min(max(fitting, 1), 2 * events, _PAGE)
        current.start = page.next_from
        current.left -= page.scanned
        if page.queued:
            log(logging.INFO, "sweep_queued", scanned=page.scanned, queued=page.queued)
        if page.next_from is None or current.left <= 0:
            self._schedule()
        return page.queued

    def _schedule(self) -> None:
        self._current, self.failure = _UnderWay(self._settings.backfill_last_n), None
        self._next_at = time.monotonic() + (self._settings.sweep_seconds or float("inf"))
