"""What is done to the queue beside the claims: what is gone is dropped, what is parked put back."""

from __future__ import annotations

import logging

import psycopg

from listener import queries
from listener.claim import EventId
from listener.database import Connection, cause_of, translated, with_all_events
from listener.errors import ConnectionLost
from listener.logs import log

# Less than what a session waits for an answer.
_PARKED_SECONDS = 8


def discard_parked(conn: Connection) -> None:
    """Drop parked events that no longer exist, unless they can't be looked at or are too many."""
    try:
        # Behind a pooler a session has no limit of its own.
        limited = queries.LIMIT_STATEMENT + ";" + queries.DISCARD_PARKED
        with_all_events(conn, limited, {"duration": f"{_PARKED_SECONDS}s"})
    except (ConnectionLost, psycopg.Error) as error:
        # One that is parked because the server can't read it fails here, too.
        if conn.closed:
            raise
        log(logging.WARNING, "parked_events_not_looked_at", cause=cause_of(error))


def delete_orphans(conn: Connection) -> int:
    """Delete embeddings whose event is gone. Returns how many; scans the whole table."""
    return with_all_events(conn, queries.DELETE_ORPHANS).rowcount


def retry(conn: Connection, event_ids: list[EventId] | None) -> list[EventId]:
    """Parked events, these or all, back to the queue with no attempt counted. Returns their ids."""
    with translated():
        rows = conn.execute(queries.RETRY, {"event_ids": event_ids}).fetchall()
        if rows:
            conn.execute(queries.NOTIFY, {"channel": "listener", "payload": ""})
    return [event_id for (event_id,) in rows]
