"""The queue: claim, read, write, and every way in which a claim can end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import psycopg
from psycopg.pq import TransactionStatus

from listener import queries
from listener.blame import in_parts, require_input, works_without_events
from listener.claim import Claim, Event, EventId, SweepPage, Vector
from listener.config import Settings
from listener.counters import counters
from listener.database import Connection, notice_loss, translated, with_all_events
from listener.errors import ConnectionLost, LostOverEvents, SchemaError
from listener.health import health
from listener.logs import log
from listener.vectors import Vectors

# A claim in another session locks a row for a moment while passing it by, a writer until it
# commits; the first is worth waiting for.
_PASSING_LOCK_SECONDS = (0.005, 0.01, 0.02, 0.04)
# One that is held for longer, or reads differently now, is looked at again so much later.
_LATER_SECONDS = 0.5
# Where listener.change begins, and how often changes are taken from there even while more follow
# after the last ones: a transaction that began earlier may commit later, into an earlier place.
_FIRST_PLACE = "(0,0)"
_LOOK_BACK_SECONDS = 1.0
# After so many attempts an event has been claimed alone once; until then a mate may be to blame.
_FIRST_ALONE = 3
_NOBODYS = 0


class Queue:
    """One worker's hold on the queue. Methods raise ConnectionLost, SchemaError, psycopg.Error."""

    def __init__(
        self, conn: Connection, settings: Settings, worker: int | None, reads_apart: bool = False
    ) -> None:
        """`worker` None: without a session of its own (a pooler), known by its leases only.

        With `reads_apart` a claim commits before its texts are read, until nothing is due.
        """
        self._conn = conn
        self._reads_apart = reads_apart
        self._settings = settings
        self._worker = worker
        self.has_session = worker is not None
        self._position = _FIRST_PLACE
        self._next_look_back = time.monotonic() + _LOOK_BACK_SECONDS
        self._has_retries, self._retries_are_next = True, False
        # Called while it is found out which event takes too long: that can outlast a lease.
        self.extend_leases: Callable[[], None] = lambda: None

    def claim(self, events: int) -> Claim | None:
        """Lease at most this many due events, or None: new changes, retries, backfill."""
        # A steady stream of changes would starve retries: these go first after each look back and,
        # while the last look found some, after each full claim.
        if self._retries_are_next:
            due = self._claim_due(events, live_only=True)
            self._has_retries, self._retries_are_next = due is not None, False
            if due:
                return due
        claim = self.claim_changes(events) or self._claim_due(events)
        self._reads_apart = self._reads_apart and claim is not None
        return claim

    def claim_changes(self, events: int) -> Claim | None:
        """Changes since the last time, from where that ended; None if there is none to claim."""
        began = time.monotonic()
        if looks_back := began >= self._next_look_back:
            self._position = _FIRST_PLACE
        rows = self._take(self._position, events)
        if looks_back:
            # Slow where many deleted rows are not vacuumed yet: it may take 1/200 of the time.
            took, poll = time.monotonic() - began, self._settings.poll_seconds
            self._next_look_back = began + min(max(_LOOK_BACK_SECONDS, 200 * took), poll)
        if not rows and self._position != _FIRST_PLACE:
            rows = self._take(_FIRST_PLACE, events)
        if not rows:
            self._position, self._retries_are_next = _FIRST_PLACE, False
            return None
        _, lease, _, self._position, changes, *_ = rows[0]
        self._retries_are_next = looks_back or (self._has_retries and changes >= events)
        claimed = [(event_id, text) for event_id, _, is_claimed, *_, text in rows if is_claimed]
        if not claimed:
            return None
        return Claim(
            lease,
            event_ids=[event_id for event_id, _ in claimed],
            # Whoever is new in the queue is at its first version.
            already_read=tuple(Event(one, 1, text) for one, text in claimed if text is not None),
            is_full=changes >= events,
            is_new=True,
        )

    def _take(self, position: str, events: int) -> list[Any]:
        seconds, worker = self._settings.lease_seconds, self._worker
        given = {"position": position, "events": events, "lease_seconds": seconds, "worker": worker}
        # Within a transaction, as in `listener check`, a failure could not be tried again.
        if not self._reads_apart and self._conn.info.transaction_status == TransactionStatus.IDLE:
            try:
                return self._execute_on_events(queries.TAKE_AND_READ, **given)
            except (psycopg.Error, ConnectionLost, SchemaError) as error:
                if self._conn.closed:
                    raise
                if isinstance(error, SchemaError):
                    require_input(self._conn)
                # embedding_input fails, and `read` finds out on which event; or iot_events is
                # locked, which TAKE doesn't need.
        return self._execute(queries.TAKE, **given)

    def _claim_due(self, events: int, *, live_only: bool = False) -> Claim | None:
        rows = self._execute(
            queries.CLAIM,
            events=events,
            live_only=live_only,
            most_deaths=max(self._settings.max_attempts, _FIRST_ALONE),
            lease_seconds=self._settings.lease_seconds,
            worker=self._worker,
        )
        if not rows:
            return None
        counters.lease_expiries += (is_suspect := any(was_leased for *_, was_leased in rows))
        for event_id, lease, attempts, _ in rows:
            if lease is None:
                log(logging.ERROR, "event_parked", event_id=event_id, attempts=attempts)
        return Claim(
            lease=next((lease for _, lease, *_ in rows if lease is not None), _NOBODYS),
            event_ids=[event_id for event_id, lease, *_ in rows if lease is not None],
            is_suspect=is_suspect,
            is_full=len(rows) >= events,
        )

    def read(self, claim: Claim) -> list[Event]:
        """The texts of a claim, at the version they belong to.

        Deleted events leave the queue here; one on which embedding_input fails is failed alone.
        """

        def read(event_ids: Sequence[EventId], lease: int) -> list[Any]:
            return self._execute_on_events(queries.READ, event_ids=list(event_ids), lease=lease)

        def fail(event_id: EventId, reason: str) -> None:
            self.fail(claim.lease, [event_id], f"embedding_input: {reason}")

        known = {event.event_id for event in claim.already_read}
        unread = [event_id for event_id in claim.event_ids if event_id not in known]
        rows = self._in_parts(claim.lease, unread, read, fail, reads_only=True)
        if deleted := [one for one, _, is_gone, _ in rows if is_gone]:
            self._discard(claim.lease, deleted)
        found = [Event(one, version, text) for one, version, is_gone, text in rows if not is_gone]
        return [*claim.already_read, *found]

    def write(
        self, lease: int, events: Sequence[Event], vectors: Sequence[Vector], model: str
    ) -> set[EventId]:
        """Store unit vectors and acknowledge, fenced by lease and version.

        Returns the ids stored. The rest changed, went, were taken over, or are held by a writer;
        those still ours are given back, due soon. A row that the database refuses fails alone.
        """

        def fail(done: tuple[Event, Vector], reason: str) -> None:
            self.fail(lease, [done[0].event_id], reason)

        write = partial(self._write, model=model)
        stored: set[EventId] = set()
        left = list(zip(events, vectors, strict=True))
        for seconds in (0.0, *_PASSING_LOCK_SECONDS):
            time.sleep(seconds)
            stored.update(self._in_parts(lease, left, write, fail, reads_only=False))
            if left := [pair for pair in left if pair[0].event_id not in stored]:
                ours = self._settle_unstored(lease, [event for event, _ in left])
                left = [pair for pair in left if pair[0].event_id in ours]
            if not left:
                return stored
        self.release(lease, [event.event_id for event, _ in left], _LATER_SECONDS)
        return stored

    def _settle_unstored(self, lease: int, events: Sequence[Event]) -> set[EventId]:
        """End the claim of those that are gone or read differently now. Returns who is left.

        One that has changed is given back to be read again; one that just reads differently fails.
        """
        event_ids = [event.event_id for event in events]
        self._discard(lease, event_ids)
        versions = [event.version for event in events]
        hashes = [event.content_hash for event in events]
        given = {"event_ids": event_ids, "versions": versions, "hashes": hashes, "lease": lease}
        rows = self._execute(queries.OUTDATED, **given)
        if changed := [event_id for event_id, has_changed in rows if has_changed]:
            self.release(lease, changed, _LATER_SECONDS)
        if others := [event_id for event_id, has_changed in rows if not has_changed]:
            self.fail(lease, others, "its text reads differently than when it was encoded")
        rows = self._execute(queries.STILL_LEASED, event_ids=event_ids, lease=lease)
        return {event_id for (event_id,) in rows}

    def _write(self, done: Sequence[tuple[Event, Vector]], lease: int, model: str) -> list[EventId]:
        rows = self._execute_on_events(
            queries.WRITE,
            event_ids=[event.event_id for event, _ in done],
            versions=[event.version for event, _ in done],
            hashes=[event.content_hash for event, _ in done],
            embeddings=Vectors(np.stack([vector for _, vector in done])),
            lease=lease,
            model=model,
        )
        counters.stored(seconds for _, seconds in rows)
        return [event_id for event_id, _ in rows]

    def _discard(self, lease: int, event_ids: Sequence[EventId]) -> None:
        health.progressed()
        with_all_events(self._conn, queries.DISCARD, {"event_ids": list(event_ids), "lease": lease})

    def fail(self, lease: int, event_ids: Sequence[EventId], reason: str) -> int:
        """Count a failed attempt: due again after a while, or parked with the reason.

        Returns how many events were still ours to fail.
        """
        # A library may quote bytes that Postgres has no text for.
        reason = reason.replace("\0", r"\x00").encode(errors="backslashreplace").decode()
        rows = self._execute(
            queries.FAIL,
            event_ids=list(event_ids),
            lease=lease,
            error=reason[:1000],
            max_attempts=self._settings.max_attempts,
            retry_seconds=self._settings.retry_seconds,
        )
        counters.failed_attempts += len(rows)
        for event_id, attempts, parked, seconds in rows:
            fields = {"event_id": event_id, "attempts": attempts, "cause": reason[:200]}
            if parked:
                log(logging.ERROR, "event_parked", **fields)
            else:
                log(logging.WARNING, "event_failed", **fields, retry_in_seconds=seconds)
        return len(rows)

    def release(self, lease: int, event_ids: Sequence[EventId], delay_seconds: float = 0.0) -> None:
        """Give events back as if they had not been claimed."""
        ids = list(event_ids)
        self._execute(queries.RELEASE, event_ids=ids, lease=lease, delay_seconds=delay_seconds)

    def extend(self, lease: int, event_ids: Sequence[EventId]) -> None:
        """A sign of life: the lease runs from now, unless it is over."""
        ids, seconds = list(event_ids), self._settings.lease_seconds
        self._execute(queries.EXTEND, event_ids=ids, lease=lease, lease_seconds=seconds)

    def sweep(
        self, model: str | None, start: str | None, events: int, since: datetime | None = None
    ) -> SweepPage:
        """Queue what lacks a current embedding in a page of events; with `model` None, all."""
        page = {"model": model, "start": start, "events": events, "since": since}
        health.progressed()
        return SweepPage(*with_all_events(self._conn, queries.SWEEP, page).fetchall()[0])

    def notify(self) -> None:
        """Wake a worker, whatever the gate says: events were queued or given back."""
        self._execute(queries.NOTIFY, channel="listener", payload="")

    def _in_parts(
        self,
        lease: int,
        items: Sequence[Any],
        run: Callable[[Sequence[Any], int], list[Any]],
        fail: Callable[[Any, str], None],
        reads_only: bool,
    ) -> list[Any]:
        return in_parts(
            items,
            lambda some: run(some, lease),
            fail,
            has_session=self.has_session,
            works_without=partial(works_without_events, self._conn, partial(run, items, _NOBODYS)),
            before_each=self.extend_leases,
            reads_only=reads_only,
        )

    def _execute_on_events(self, statement: str, **parameters: Any) -> list[Any]:
        notice_loss(self._conn)
        try:
            return self._execute(statement, **parameters)
        except ConnectionLost as error:
            if not self._conn.closed:
                raise
            raise LostOverEvents(str(error), parameters.get("event_ids", [])) from error

    def _execute(self, statement: str, **parameters: Any) -> list[Any]:
        health.progressed()
        with translated():
            cursor = self._conn.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []
