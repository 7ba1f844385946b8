"""The sweep of the last N events, page by page, at start-up and on its timer."""

from __future__ import annotations

import logging
import time

import psycopg
from psycopg.errors import LockNotAvailable

from listener.config import Settings
from listener.database import Connection, cause_of
from listener.errors import ConnectionLost, StatementTimeout
from listener.logs import log
from listener.queue import Queue
from listener.upkeep import discard_parked

# New events wait while a page is swept.
_PAGE, _PAGE_SECONDS = 500, 0.25


class Sweep:
    """Where the sweep stands. Outlives a connection, which one of its events may be what breaks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._page_events = _PAGE
        self._is_blind = False
        # Events and seconds; and whether a page takes as long whatever its size.
        self._last_page: tuple[int, float] | None = None
        self._is_fixed = False
        self._from: str | None = None
        self._left = settings.backfill_last_n
        self._next = time.monotonic() if settings.backfill_last_n else float("inf")

    def seconds_left(self) -> float:
        """Until it begins; 0 or less while it is under way."""
        return self._next - time.monotonic()

    def page(self, conn: Connection, queue: Queue, model: str) -> bool:
        """Queue one page of the last N, if it is time to. Returns whether there is more to do.

        A page at a time, so that live events never wait behind a long sweep and the queue stays
        short. One that fails, takes too long or loses the connection is tried again by halves, and
        one event alone is queued blindly: the worker finds out what it has to do with it.
        """
        if self._left <= 0 or self.seconds_left() > 0:
            return False
        queued, events = 0, min(self._page_events, self._left)
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
        self._page_events = max(events // 2, 1)
        is_last = events == 1 and (self._is_blind or not may_be_blind)
        if is_last:
            # To begin anew at once would fail again.
            log(logging.WARNING, "sweep_given_up", left=self._left, cause=cause_of(error))
            self._schedule()
        self._is_blind = events == 1 and not is_last

    def _queue_page(self, queue: Queue, model: str, events: int) -> int:
        began = time.monotonic()
        page = queue.sweep(None if self._is_blind else model, self._from, events)
        self._is_blind = False
        fitting = self._fitting(events, max(time.monotonic() - began, 1e-3))
        # By doubling, or an event that was just found to be too much would be met in a full page.
        self._page_events = min(max(fitting, 1), 2 * events, _PAGE)
        self._from = page.next_from
        self._left -= page.scanned
        if page.queued:
            log(logging.INFO, "backfill_queued", scanned=page.scanned, queued=page.queued)
        if page.next_from is None or self._left <= 0:
            self._schedule()
        return page.queued

    def _fitting(self, events: int, took: float) -> int:
        """How many events a page should have, by what this page and the one before took."""
        last_events, last_took = self._last_page or (events, took)
        self._last_page = (events, took)
        if events != last_events:
            proportional = last_took * events / last_events
            self._is_fixed = abs(took - last_took) < abs(took - proportional)
        # As where all events are sorted for each page: a smaller one takes no less.
        return _PAGE if self._is_fixed else int(events * _PAGE_SECONDS / took)

    def _schedule(self) -> None:
        self._from = None
        self._left = self._settings.backfill_last_n
        self._next = time.monotonic() + (self._settings.sweep_seconds or float("inf"))
