"""A worker's sign of life: a number, a session lock of that number, and a row for status."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from listener import queries
from listener.database import Connection, translated
from listener.errors import ConnectionLost

# The first half of each worker's lock key.
LOCK_CLASS = 470_211
_MOST_HELD = 1000
_SEEN_SECONDS = 30.0
# Dead peers are looked for this often: more would be felt by an idle server.
BEAT_SECONDS = 1.2


class Worker:
    """One registered worker; its lock lives as long as the session of `conn`."""

    def __init__(self, conn: Connection, number: int) -> None:
        self._conn = conn
        self.number = number
        self._next_seen = time.monotonic() + _SEEN_SECONDS

    @classmethod
    @contextmanager
    def registered(cls, conn: Connection, model: str) -> Iterator[Worker]:
        """Register, release what dead workers hold, and on a clean leave sign off."""
        with translated():
            number = _new_number(conn)
            _register(conn, number, model)
        beat(conn, number)
        yield cls(conn, number)
        # Not after an error: then events may still be leased, and the row tells a peer whose.
        with translated():
            conn.execute(queries.FORGET_WORKER, {"worker": number})

    def be_seen(self) -> None:
        """Renew the time in the row, once in a while."""
        if time.monotonic() >= self._next_seen:
            with translated():
                self._conn.execute(queries.SEE_WORKER, {"worker": self.number})
            self._next_seen = time.monotonic() + _SEEN_SECONDS


def _new_number(conn: Connection) -> int:
    """A new number, its lock held. Other sessions may hold some of the next ones, hardly many."""
    for _ in range(_MOST_HELD):
        row = conn.execute(queries.NEW_WORKER, {"lock_class": LOCK_CLASS}).fetchone()
        assert row is not None  # noqa: S101  nextval gives a row
        number, is_locked = row
        if is_locked:
            return int(number)
    raise ConnectionLost(
        f"the advisory locks ({LOCK_CLASS}, {number - _MOST_HELD + 1} to {number}) are held; see "
        "pg_locks for the session that does it, and end it"
    )


def _register(conn: Connection, number: int, model: str) -> None:
    host, pid = socket.gethostname(), os.getpid()
    given = {"worker": number, "host": host, "pid": pid, "model": model}
    conn.execute(queries.REGISTER_WORKER, given)


def rehearse(conn: Connection) -> None:
    """Try a worker's statements, in a transaction of the caller's that is rolled back.

    Keeps no lock, as a transaction pooler would, and compacts nothing, which keeps writers out.
    """
    with translated():
        number = _new_number(conn)
        lock = {"lock_class": LOCK_CLASS, "worker": number}
        conn.execute(queries.UNLOCK_WORKER, lock)
        _register(conn, number, "")
        conn.execute(queries.BEAT, lock)
        conn.execute(queries.SEE_WORKER, {"worker": number})
        conn.execute(queries.FORGET_WORKER, {"worker": number})


def beat(conn: Connection, worker: int | None) -> bool:
    """Release the events of workers whose session is gone, and get rid of many dead rows.

    `worker` is the caller's own number, on either of its connections; None, as behind a pooler,
    releases nothing. Returns whether anything in the queue is due, of which no NOTIFY tells.
    """
    with translated():
        parameters = {"lock_class": LOCK_CLASS, "worker": worker}
        row = conn.execute(queries.BEAT, parameters).fetchone()
        assert row is not None  # noqa: S101  a select without a from gives a row
        is_due, has_many_dead = row
        if has_many_dead:
            conn.execute(queries.COMPACT)
    return bool(is_due)
