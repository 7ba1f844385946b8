"""`listener backfill`: queue what lacks a current embedding, then follow the drain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from listener.database import Connection
from listener.errors import StatementTimeout
from listener.queue import Queue
from listener.status import count_pending_since

_PAGE = 2_000
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Queued:
    """How many events a backfill has looked at and queued so far."""

    scanned: int
    queued: int


def queue_events(
    queue: Queue,
    model: str,
    last: int | None,
    since: datetime | None,
) -> Iterator[Queued]:
    """Sweep the newest `last` events (None: all); the counts after each page.

    Each page is a transaction of its own; one that takes too long is tried again by halves. Left
    off and run again, it finds what it queued already queued.
    """
    scanned = queued = 0
    most, start = _PAGE, None
    while last is None or scanned < last:
        events = most if last is None else min(most, last - scanned)
        try:
            page = queue.sweep(model, start, events, since)
        except StatementTimeout:
            if events == 1:
                raise
            most = events // 2
        else:
            # The time-out may have been a lock's, so pages grow again.
            most = min(2 * events, _PAGE)
            scanned, queued, start = scanned + page.scanned, queued + page.queued, page.next_from
            queue.notify()
            if start is None:
                last = scanned
        yield Queued(scanned, queued)


def follow(
    conn: Connection,
    moment: float,
    progress: Callable[[int, float], None],
    is_over: Callable[[], bool],
) -> None:
    """Report what is left and the rate in events a second until nothing is, or `is_over`.

    Of what waited at `moment`, by the database's clock: where devices never rest, something always
    does.
    """
    began = time.monotonic()
    left = first = count_pending_since(conn, moment)
    took = time.monotonic() - began
    if left:
        progress(left, 0.0)
    while left and not is_over():
        # Of the database's time no more than a quarter goes into being looked at.
        again = time.monotonic() + max(_LOOK_SECONDS, 3 * took)
        while time.monotonic() < again and not is_over():
            time.sleep(_LOOK_SECONDS)
        looked = time.monotonic()
        left = count_pending_since(conn, moment)
        took = time.monotonic() - looked
        rate = (first - left) / (time.monotonic() - began)
        progress(left, max(rate, 0.0))
