"""Applications that write events in every way, at a pace, and are never to be failed by us."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psycopg

from tests.soak import statements
from tests.soak.background import Background
from tests.soak.ground import Connection, Ground, dice

# What an application would set; a service that blocks it for longer has failed it.
_TIMEOUT = "-c statement_timeout=20s"
_RECONNECT_SECONDS = 0.1
# Updates and deletes go to this many of the newest events; long transactions leave the newest be.
_RECENT, _SETTLED = 5_000, 2_000
# How long a transaction with changes stays open.
_HELD_SECONDS = (1.0, 4.0)


@dataclass
class Tally:
    """What all writers did. Statistics only: the truth about events is in the database."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    excused: int = 0
    slowest_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, counts: Counter[str]) -> None:
        with self._lock:
            self.counts += counts

    def failed(self, error: str, *, is_excused: bool) -> None:
        with self._lock:
            if is_excused:
                self.excused += 1
            else:
                self.errors.append(error)

    def took(self, seconds: float) -> None:
        self.slowest_seconds = max(self.slowest_seconds, seconds)


class Writer(Background):
    """One application with one connection."""

    def __init__(self, number: int, ground: Ground, tally: Tally, rate: float, seed: int) -> None:
        """`rate` is in events a second."""
        super().__init__(f"writer-{number}")
        self._ground = ground
        self._tally = tally
        self._rate = rate
        self._dice = dice(seed, self.name)
        self._newest = 1
        self._fine_at = time.monotonic()
        self._actions: list[tuple[int, Callable[[Connection], Counter[str]]]] = [
            (30, self._insert_one),
            (12, self._insert_some),
            (3, self._copy),
            (22, self._update_text),
            (6, self._update_many),
            (10, self._update_other_column),
            (8, self._update_hot_row),
            (10, self._delete_some),
            (8, self._delete_and_insert_again),
            (4, self._delete_then_insert_again),
            (6, self._roll_back),
            (2, self._hold),
        ]

    def step(self) -> None:
        """One action, and a pause that keeps the pace."""
        began = time.monotonic()
        events = 1
        try:
            conn = self._connected()
            weights, actions = zip(*self._actions, strict=True)
            counts = self._dice.choices(actions, weights)[0](conn)
            self._tally.add(counts)
            self._fine_at = time.monotonic()
            events = counts.total()
        except psycopg.Error as error:
            self._failed(error)
        pause = events / self._rate * self._dice.uniform(0.5, 1.5)
        self.stopped.wait(max(pause - (time.monotonic() - began), 0))

    def _connected(self) -> Connection:
        if self._conn is None or self._conn.closed:
            self._conn = psycopg.connect(
                self._ground.url,
                autocommit=True,
                application_name="soak-writer",
                options=_TIMEOUT,
                connect_timeout=10,
            )
        return self._conn

    def _failed(self, error: psycopg.Error) -> None:
        """A connection may have been cut while the writer slept, so all of that time counts."""
        is_excused = self._ground.outages.touch(self._fine_at)
        is_cut = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        text = f"{type(error).__name__}: {error}"
        self._tally.failed(text, is_excused=is_excused and is_cut)
        if self._conn is not None:
            self._conn.close()
        self.stopped.wait(_RECONNECT_SECONDS)

    def _ids(self, conn: Connection, statement: bytes, **parameters: object) -> list[int]:
        """The first column of what the statement returns."""
        began = time.monotonic()
        ids = [row[0] for row in conn.execute(statement, parameters)]
        self._tally.took(time.monotonic() - began)
        return ids

    def _from(self, settled: int = 0) -> int:
        return max(self._newest - self._dice.randint(settled, _RECENT), 1)

    def _inserted(self, ids: list[int]) -> Counter[str]:
        self._newest = max([self._newest, *ids])
        return Counter(inserted=len(ids))

    def _insert(self, conn: Connection, events: int) -> Counter[str]:
        return self._inserted(self._ids(conn, statements.INSERT, events=events))

    def _update(self, conn: Connection, statement: bytes, events: int) -> Counter[str]:
        ids = self._ids(conn, statement, start=self._from(), events=events)
        return Counter(updated=len(ids))

    def _insert_one(self, conn: Connection) -> Counter[str]:
        return self._insert(conn, 1)

    def _insert_some(self, conn: Connection) -> Counter[str]:
        return self._insert(conn, self._dice.randint(2, 20))

    def _copy(self, conn: Connection) -> Counter[str]:
        events = self._dice.randint(20, 200)
        messages = [row[0] for row in conn.execute(statements.MESSAGES, {"events": events})]
        with conn.cursor() as cursor, cursor.copy(statements.COPY) as copy:
            for message in messages:
                copy.write_row((f"pump-{self._dice.randint(1, 50)}", "copied", "info", message))
        return Counter(inserted=events)

    def _update_text(self, conn: Connection) -> Counter[str]:
        return self._update(conn, statements.UPDATE_TEXT, 1)

    def _update_many(self, conn: Connection) -> Counter[str]:
        return self._update(conn, statements.UPDATE_TEXT, self._dice.randint(2, 20))

    def _update_other_column(self, conn: Connection) -> Counter[str]:
        return self._update(conn, statements.UPDATE_OTHER_COLUMN, self._dice.randint(1, 5))

    def _update_hot_row(self, conn: Connection) -> Counter[str]:
        start, counts = self._from(), Counter[str]()
        for _ in range(self._dice.randint(2, 10)):
            ids = self._ids(conn, statements.UPDATE_TEXT, start=start, events=1)
            counts += Counter(updated=len(ids))
        return counts

    def _delete_some(self, conn: Connection) -> Counter[str]:
        events = self._dice.randint(1, 5)
        ids = self._ids(conn, statements.DELETE, start=self._from(), events=events)
        return Counter(deleted=len(ids))

    def _delete_and_insert_again(self, conn: Connection) -> Counter[str]:
        """The same id within one transaction."""
        with conn.transaction():
            return self._delete_then_insert_again(conn)

    def _delete_then_insert_again(self, conn: Connection) -> Counter[str]:
        """The same id with another text, or with the old one; the event is away in between."""
        start = self._from()
        row = conn.execute(statements.DELETE_WHOLE, {"start": start}).fetchone()
        if row is None:
            return Counter()
        event_id, message = row
        same = self._dice.random() < 0.5
        self._ids(conn, statements.INSERT_WITH_ID, id=event_id, message=message if same else None)
        return Counter(deleted=1, inserted=1)

    def _roll_back(self, conn: Connection) -> Counter[str]:
        with conn.transaction(force_rollback=True):
            choice = self._dice.choice([self._insert_some, self._update_many, self._delete_some])
            choice(conn)
        return Counter({"rolled back": 1})

    def _hold(self, conn: Connection) -> Counter[str]:
        """Ids drawn now and committed seconds later, after many higher ones."""
        with conn.transaction():
            counts = self._insert(conn, self._dice.randint(1, 5))
            start = self._from(_SETTLED)
            self.stopped.wait(self._dice.uniform(*_HELD_SECONDS))
            counts += Counter(
                updated=len(self._ids(conn, statements.UPDATE_TEXT, start=start, events=2))
            )
            self.stopped.wait(self._dice.uniform(*_HELD_SECONDS) / 4)
        return counts


def start_writers(ground: Ground, tally: Tally, rate: float, seed: int) -> list[Writer]:
    """Four writers that make this many changes a second together."""
    writers = [Writer(number, ground, tally, rate / 4, seed) for number in range(1, 5)]
    for writer in writers:
        writer.start()
    return writers
