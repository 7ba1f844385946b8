"""When to sleep and when to wake: LISTEN on a connection of its own, and the sleep gate.

Of all workers one leads: it holds LEADER_KEY and alone listens to the writers, so that one insert
wakes one worker. Before it sleeps it takes GATE_KEY, which succeeds only when no writer that
trusted the gate is in flight; then a drain, then sleep, the gate closed all the while, and what is
notified meanwhile remembered. On waking it drains; where there is more than one event, it opens the
gate. The others look at the queue every second, take over when the leader's session ends, and are
called when the first claim was full.
"""

from __future__ import annotations

import logging
import random
import secrets
import selectors
import time
from contextlib import closing

from listener import queries
from listener.database import Connection, translated
from listener.logs import log
from listener.stop import Stop

# Any two numbers will do, as long as nothing else in the database uses them.
GATE_KEY = 4_702_111_384
LEADER_KEY = 4_702_111_385

_PROBE_SECONDS = 2.0
_FOLLOWER_SECONDS = 1.0
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.01, 0.05


class Wakeup:
    """The wait of one worker, on the connection named listener-wake."""

    def __init__(self, conn: Connection, stop: Stop, mode: str, poll_seconds: float) -> None:
        """`mode` is the setting NOTIFY."""
        self._conn = conn
        self._stop = stop
        self._mode = mode
        self._poll_seconds = poll_seconds
        self._leads = False
        self._gate_closed = False
        self._was_notified = False
        self._look_seconds = _FIRST_LOOK_SECONDS
        self._selector = selectors.DefaultSelector()
        self._selector.register(stop.read_end, selectors.EVENT_READ)

    def close(self) -> None:
        """Free the selector; connection and stop are their openers'."""
        self._selector.close()

    def listen(self, work: Connection) -> bool:
        """LISTEN as a follower, and prove with a NOTIFY from `work` that notifications arrive.

        Returns False on a transaction pooler, where neither LISTEN nor session locks hold; then
        the worker polls. With the mode `never` it sends no NOTIFY and polls in any case; a pooler
        then shows by the backends' numbers.
        """
        with translated():
            if self._mode == "never" and not self._is_direct(work):
                return False
            self._conn.execute(queries.LISTEN_HELP)
            if self._mode != "never" and not self._probe(work):
                self._mode = "never"
                log(
                    logging.WARNING,
                    "notify_does_not_arrive",
                    poll_seconds=self._poll_seconds,
                    remedy="connect directly or to a session pooler",
                )
                return False
        self._selector.register(self._conn.fileno(), selectors.EVENT_READ)
        return True

    def _probe(self, work: Connection) -> bool:
        token = secrets.token_hex(8)
        self._conn.execute(queries.LISTEN_PROBE)
        # From the other connection: a pooler may return a session's own NOTIFY to it.
        sent = work.execute(queries.NOTIFY, {"channel": "listener_probe", "payload": token})
        if sent.rowcount == 0:
            # The NOTIFY queue is half full.
            arrived = self._is_direct(work)
        else:
            # Another worker's may come first. Closed, or it would keep the connection to itself.
            with closing(self._conn.notifies(timeout=_PROBE_SECONDS)) as notes:
                arrived = any(note.payload == token for note in notes)
        self._conn.execute(queries.UNLISTEN_PROBE)
        return arrived

    def _is_direct(self, work: Connection) -> bool:
        """Whether no pooler is between: it would tell its clients another number of the backend."""
        return all(
            conn.execute(queries.BACKEND).fetchone() == (conn.info.backend_pid,)
            for conn in (self._conn, work)
        )

    def prepare_sleep(self) -> float:
        """Close the gate if that is possible now. Returns how long to sleep, in seconds.

        The caller drains before it sleeps, whatever this returns.
        """
        if self._mode == "never" or self._gate_closed:
            return self._poll()
        with translated():
            if not self._leads and not self._try_lead():
                return random.uniform(0.8, 1.2) * _FOLLOWER_SECONDS  # noqa: S311  jitter
            self._gate_closed = self._try_lock(GATE_KEY)
        if self._gate_closed:
            self._look_seconds = _FIRST_LOOK_SECONDS
            return self._poll()
        # A writer that didn't notify has not committed yet.
        seconds = self._look_seconds
        self._look_seconds = min(seconds * 1.5, _LAST_LOOK_SECONDS)
        return seconds

    def open_gate(self) -> None:
        """Let writers commit without NOTIFY, while the worker has more to do."""
        if self._gate_closed and self._mode == "gated":
            with translated():
                self._conn.execute(queries.UNLOCK, {"key": GATE_KEY})
            self._gate_closed = False

    def sleep(self, seconds: float) -> bool:
        """Sleep until a NOTIFY, a stop or the time is up. Returns whether it was a NOTIFY."""
        # One that came with the answer to a query is with the driver; the socket is silent of it.
        self.take_notes()
        was_notified, self._was_notified = self._was_notified, False
        if was_notified:
            return True
        deadline = time.monotonic() + seconds
        while not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._selector.select(left) and self._clear():
                return True
        return False

    def take_notes(self) -> None:
        """Take them from the driver, where they pile up while we are awake; the next sleep ends."""
        self._was_notified = self._clear() or self._was_notified

    def _clear(self) -> bool:
        """Take what notifications are there, before the drain that answers them, never after."""
        with translated():
            return bool(list(self._conn.notifies(timeout=0)))

    def call_help(self, work: Connection) -> None:
        """Wake the followers: there is more in the queue than one claim holds."""
        with translated():
            work.execute(queries.NOTIFY, {"channel": "listener_help", "payload": ""})

    def _try_lead(self) -> bool:
        if self._try_lock(LEADER_KEY):
            self._conn.execute(queries.UNLISTEN_HELP)
            self._conn.execute(queries.LISTEN)
            self._leads = True
        return self._leads

    def _try_lock(self, key: int) -> bool:
        row = self._conn.execute(queries.TRY_LOCK, {"key": key}).fetchone()
        return row is not None and bool(row[0])

    def _poll(self) -> float:
        return random.uniform(0.8, 1.0) * self._poll_seconds  # noqa: S311  jitter
