"""What the state machine stands on: the changes, what they call for, workers and sessions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, LiteralString

import numpy as np
import pytest
from hypothesis import strategies as st

from listener import queue as queue_module
from listener.claim import Claim, Event, EventId, Vector
from listener.database import Connection, connect
from listener.queue import Queue
from listener.worker import Worker
from tests.harness import Database, TinyEmbedder, vector_of, wait_until

MODEL = TinyEmbedder.fingerprint
# plain: in autocommit; replica: as replication writes, without cascades; silent: triggers off.
How = Literal["plain", "replica", "silent"]

_WRITE = """
insert into public.iot_events (id, device_id, event_type, severity, message)
overriding system value values (%(event)s, 'pump', 'status', 'info', %(message)s)
on conflict (id) do update set message = excluded.message
"""
_TOUCH = "update public.iot_events set device_id = device_id || '.' where id = %(event)s"
_DELETE = "delete from public.iot_events where id = %(event)s"
_SURROUNDINGS: dict[How, tuple[tuple[LiteralString, ...], tuple[LiteralString, ...]]] = {
    "plain": ((), ()),
    "replica": (("set local session_replication_role = replica",), ()),
    "silent": (
        ("alter table public.iot_events disable trigger user",),
        (
            "alter table public.iot_events enable always trigger listener_inserted",
            "alter table public.iot_events enable always trigger listener_updated",
        ),
    ),
}


@dataclass(frozen=True)
class Step:
    """A method of the machine and what it is called with."""

    name: str
    arguments: dict[str, Any]


def step(name: str, weight: int, **arguments: st.SearchStrategy[Any]) -> list[Any]:
    """As often as its weight; hypothesis counts the same strategy twice as one."""
    return [st.builds(Step, st.just(name), st.fixed_dictionaries(arguments)) for _ in range(weight)]


@dataclass(frozen=True)
class Change:
    """What a device or an operator does to one event."""

    kind: Literal["write", "touch", "delete", "replace"]
    event: int
    message: str | None

    def perform(self, conn: Connection, how: How) -> None:
        statements = {
            "write": (_WRITE,),
            "touch": (_TOUCH,),
            "delete": (_DELETE,),
            "replace": (_DELETE, _WRITE),
        }
        before, after = _SURROUNDINGS[how]
        for statement in (*before, *statements[self.kind], *after):
            conn.execute(statement, {"event": self.event, "message": self.message})

    def text(self) -> str:
        """As embedding_input gives it: without the lines that would be empty."""
        known = "event_type: status\nseverity: info"
        return f"{known}\nmessage: {self.message}" if self.message else known


@dataclass
class Life:
    """An event from its insert to its delete: its texts, and how far its vector has come.

    `inherits`: its id's last life was deleted without the cascade and may have left a vector.
    """

    texts: list[str]
    inherits: bool
    stored: int = -1


@dataclass
class Expected:
    """What the committed changes call for."""

    alive: dict[int, Life] = field(default_factory=dict)
    # Changed while triggers were off, and not swept since.
    unseen: set[int] = field(default_factory=set)
    # Deleted: may be queued still, until a claim or a sweep looks.
    ghosts: set[int] = field(default_factory=set)
    # Deleted without the cascade: may have a vector still.
    orphans: set[int] = field(default_factory=set)
    # The lease of each event that nobody but its holder may claim.
    leased: dict[EventId, int] = field(default_factory=dict)

    def apply(self, change: Change, how: How) -> None:
        life = self.alive.get(change.event)
        if life is not None and change.kind in ("delete", "replace"):
            self._delete(change.event, how)
        if change.kind == "replace" or (change.kind == "write" and life is None):
            self._insert(change, how)
        elif change.kind == "write" and life is not None and life.texts[-1] != change.text():
            life.texts.append(change.text())
            self._see(change.event, how)

    def _see(self, event: int, how: How) -> None:
        (self.unseen.add if how == "silent" else self.unseen.discard)(event)

    def _insert(self, change: Change, how: How) -> None:
        self.alive[change.event] = Life([change.text()], inherits=change.event in self.orphans)
        self.orphans.discard(change.event)
        self.ghosts.discard(change.event)
        self._see(change.event, how)

    def _delete(self, event: int, how: How) -> None:
        del self.alive[event]
        self.unseen.discard(event)
        self.ghosts.add(event)
        if how == "replica":
            self.orphans.add(event)

    def lease(self, claim: Claim, changed: set[EventId]) -> None:
        """`changed`: those whose change waited, which takes the lease away."""
        stolen = self.leased.keys() & set(claim.event_ids) - changed
        assert not stolen, "claimed although leased"
        self.leased |= dict.fromkeys(claim.event_ids, claim.lease)

    def unlease(self, claim: Claim, events: Iterable[EventId]) -> None:
        for event in events:
            if self.leased.get(event) == claim.lease:
                del self.leased[event]

    def check(self, stored: Mapping[int, tuple[bytes, Vector]], queued: set[int]) -> None:
        """`stored` is the text's hash and the vector of each event that has one."""
        assert stored.keys() <= self.alive.keys() | self.orphans, "a vector without its event"
        assert queued <= self.alive.keys() | self.ghosts, "queued without its event"
        for event, life in self.alive.items():
            if event in stored:
                _advance(life, *stored[event])
            is_current = event in stored and life.stored == len(life.texts) - 1
            assert is_current or event in queued | self.unseen, f"event {event} is lost"


def _advance(life: Life, digest: bytes, vector: Vector) -> None:
    """A text that came back counts as its newest occurrence."""
    found = [n for n, text in enumerate(life.texts) if Event(0, 0, text).content_hash == digest]
    if not found:
        assert life.inherits, "a vector of a text that the event never had"
        return
    life.inherits = False
    assert found[-1] >= life.stored, "the vector went back to an older text"
    life.stored = found[-1]
    assert np.array_equal(vector, vector_of(life.texts[life.stored])), "another text's vector"


@dataclass(eq=False)
class Hand:
    """A claim that a worker holds; `events` once it has read and encoded them."""

    seat: Seat
    claim: Claim
    events: list[Event] | None = None

    def write(self) -> set[EventId]:
        assert self.events is not None
        vectors = [vector_of(event.text) for event in self.events]
        return self.seat.queue.write(self.claim.lease, self.events, vectors, MODEL)


@dataclass(eq=False)
class Seat:
    """A worker process: a registered session, its queue, and what it has in hand."""

    database: Database
    hands: list[Hand] = field(default_factory=list)
    session: ExitStack | None = None

    def start(self) -> None:
        self.session = ExitStack()
        self.conn = self.session.enter_context(
            connect(self.database.settings, "listener-work", as_service=True)
        )
        self.worker = self.session.enter_context(Worker.registered(self.conn, MODEL))
        self.queue = Queue(self.conn, self.database.settings, self.worker.number)

    def crash(self) -> None:
        """Without a word: the row in listener.worker stays, the lock goes with the session."""
        pid = self.conn.info.backend_pid
        self.database.rows("select pg_terminate_backend(%s)", pid)
        wait_until(
            lambda: not self.database.rows("select 1 from pg_stat_activity where pid = %s", pid)
        )
        self.conn.close()
        self.session = None
        self.hands.clear()


@dataclass
class Plant:
    """The sessions, made once for all walks: making them takes longer than a walk."""

    database: Database
    device: Connection
    writer: Connection
    seats: tuple[Seat, Seat]

    def reset(self) -> None:
        """What a fresh database would be."""
        self.writer.rollback()
        self.device.execute("truncate public.iot_events cascade")
        self.device.execute("delete from listener.change")
        self.device.execute("delete from listener.queue")
        for seat in self.seats:
            seat.hands.clear()
            if seat.session is None:
                seat.start()


@contextmanager
def plant(database: Database) -> Iterator[Plant]:
    """Settings under which nothing but a step lets time pass, so that a walk can be repeated."""
    database = database.with_settings(lease_seconds=36_000, retry_seconds=7_200, max_attempts=3)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(queue_module, "_LATER_SECONDS", 36_000.0)
        patch.setattr(queue_module, "_PASSING_LOCK_SECONDS", (0.0,))
        device, writer = (stack.enter_context(database.session()) for _ in range(2))
        for conn in (device, writer, database.conn):
            # A writer that had to wait for the service would fail here.
            conn.execute("set lock_timeout = '1s'")
            conn.prepare_threshold = 5
        writer.autocommit = False
        seats = (Seat(database), Seat(database))
        yield Plant(database, device, writer, seats)
        for seat in seats:
            if seat.session is not None:
                seat.session.close()
