"""No interleaving of writers and workers loses a wake-up: in a model, and on a real Postgres."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from listener import service
from listener.claim import Claim, EventId
from listener.database import Connection
from listener.queue import Queue
from listener.wakeup import GATE_KEY, Wakeup
from listener.worker import beat
from tests.gate_model import BROKEN, HARMLESS, NAPS, Protocol, State, World, explore
from tests.harness import Database, is_asleep, serving, wait_until

REAL = Protocol()

# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [World(), World(writers=2, commits=1)], ids=str)
def test_no_interleaving_loses_a_wake_up(world: World) -> None:
    """Whenever a committed row waits, somebody is awake or about to be."""
    exploration = explore(REAL, world)

    assert exploration.lost is None, exploration.trace()


def test_a_transaction_of_two_statements_loses_no_wake_up() -> None:
    """It may find the gate closed first and open later, or the other way round."""
    protocol = Protocol(writer=("insert", "try", "insert", "try", "show", "release", "deliver"))

    exploration = explore(protocol, World())

    assert exploration.lost is None, exploration.trace()


def _writer_is_at(state: State, step: str) -> bool:
    writer = state.writers[0]
    return writer.commits_left > 0 and REAL.writer[writer.at] == step


_SITUATIONS: dict[str, Callable[[State], bool]] = {
    "a worker sleeps behind the closed gate and a writer notifies it": lambda s: (
        s.gate == s.leader == 0
        and s.workers[0].at == "sleep"
        and _writer_is_at(s, "deliver")
        and s.writers[0].addressee == 0
    ),
    "a writer finds the gate open and commits without a notification": lambda s: (
        s.gate is None and _writer_is_at(s, "release") and not s.writers[0].notifies
    ),
    "a writer in flight keeps the leader from its sleep": lambda s: (
        s.workers[0].at == "sleep" and not s.workers[0].is_patient and s.writers[0].trusts
    ),
    "all rest": lambda s: (
        not s.is_pending
        and s.writers[0].commits_left == 0
        and {worker.at for worker in s.workers} == {"sleep", NAPS}
    ),
    "a ping takes a notification off the socket": lambda s: (
        s.workers[0].at == "sleep" and s.workers[0].in_driver and s.is_pending
    ),
    "a notification goes to nobody, between two leaders": lambda s: (
        s.leader is None
        and s.deaths_left == 0
        and _writer_is_at(s, "deliver")
        and s.writers[0].notifies
    ),
    "the follower has taken over": lambda s: s.leader == 1 and s.deaths_left == 0,
}


@functools.cache
def _reached() -> frozenset[State]:
    return frozenset(explore(REAL, World()).reached)


@pytest.mark.parametrize("situation", _SITUATIONS)
def test_the_model_reaches_what_the_gate_is_for(situation: str) -> None:
    """A proof about states that never come about would prove nothing."""
    assert any(map(_SITUATIONS[situation], _reached()))


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_gate_is_caught(fault: str) -> None:
    """Each step of the protocol, left out or moved, loses a wake-up in some interleaving."""
    exploration = explore(BROKEN[fault], World())

    assert exploration.lost is not None, f"{len(exploration.reached)} states, none of them lost"
    assert exploration.trace().count("\n") > 5


@pytest.mark.parametrize("change", HARMLESS)
def test_the_order_on_waking_is_not_what_keeps_wake_ups(change: str) -> None:
    """The drain behind the closed gate makes up for it; a drain before that only costs time."""
    exploration = explore(HARMLESS[change], World())

    assert exploration.lost is None, exploration.trace()


# --- the real code, step by step ----------------------------------------------------------------

# Far more than a step takes, far less than the poll.
_STEP_SECONDS = 10.0
# A sleep this short is a look at a writer in flight, which needs no notification to end.
_LOOK_SECONDS = 0.06


class Stepper:
    """Holds a real service before each step of its loop until the test lets it go on."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self._database = database
        self._arrivals: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self._permits = threading.Semaphore(0)
        self._is_free = False
        # None: the service sleeps until a notification.
        self._at: tuple[str, float] | None = None
        self.unclaimed: set[EventId] = set()
        self.trace: list[str] = []
        self.looks = self.wakes = 0
        steps = [(Wakeup, "prepare_sleep"), (Wakeup, "sleep"), (Wakeup, "open_gate")]
        for owner, name in [(Queue, "claim"), *steps]:
            monkeypatch.setattr(owner, name, self._stepped(name, getattr(owner, name)))

    def _stepped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(owner: object, *arguments: Any) -> Any:
            if not self._is_free:
                self._arrivals.put((name, arguments[0] if name == "sleep" else 0.0))
                self._permits.acquire()
            result = original(owner, *arguments)
            if isinstance(result, Claim):
                self.unclaimed.difference_update(result.event_ids)
            return result

        return step

    def _arrival(self) -> tuple[str, float]:
        try:
            return self._arrivals.get(timeout=_STEP_SECONDS)
        except queue.Empty:
            raise AssertionError(f"the service is stuck after {self.trace}") from None

    def rest(self) -> None:
        """Take a service from its first step to its first sleep."""
        self._at = self._arrival()
        self.finish()

    def rouse(self, *texts: str) -> None:
        """Wake the sleeping service by events, and hold it before its first step."""
        self.unclaimed.update(self._database.insert(*texts))
        self._at = self._woken()
        self.trace.clear()

    def advance(self) -> None:
        """One step of the service; nothing if it sleeps and has no reason to wake."""
        if self._at is None:
            if not self.unclaimed:
                return
            self._at = self._woken()
            self.wakes += 1
        name, seconds = self._at
        self.trace.append(f"worker: {name}")
        self._permits.release()
        is_look = name == "sleep" and seconds < _LOOK_SECONDS
        self.looks += is_look
        self._at = self._arrival() if name != "sleep" or is_look else None

    def _woken(self) -> tuple[str, float]:
        # On a slow machine a beat may end just before the notification comes: not two of them.
        for _ in range(2):
            name, seconds = self._arrival()
            if name != "sleep":
                return name, seconds
            self._permits.release()
        raise AssertionError("slept through a commit:\n" + "\n".join(self.trace))

    def finish(self) -> None:
        """Go on until the service sleeps and has claimed everything."""
        while self._at is not None or self.unclaimed:
            self.advance()

    def free(self) -> None:
        """Let the service run without the test."""
        self._is_free = True
        self._permits.release(1000)


def _transaction(conn: Connection, stepper: Stepper, name: str) -> Iterator[None]:
    """A writer's two steps."""
    conn.execute("begin")
    row = conn.execute(
        "insert into public.iot_events (device_id, event_type, severity) "
        "values ('d', 't', 's') returning id"
    ).fetchone()
    assert row is not None
    stepper.trace.append(f"{name}: insert")
    yield
    conn.execute("commit")
    stepper.unclaimed.add(row[0])
    stepper.trace.append(f"{name}: commit")
    yield


def _interleavings(steps: dict[str, int]) -> Iterator[list[str]]:
    """Every order of so many steps of each party."""
    if not any(steps.values()):
        yield []
    for name, left in steps.items():
        if left:
            for rest in _interleavings({**steps, name: left - 1}):
                yield [name, *rest]


@contextmanager
def _stepped_service(
    database: Database, monkeypatch: pytest.MonkeyPatch, batch_events: int = 1
) -> Iterator[Stepper]:
    # With claims of one event at most, each is full, and so opens the gate.
    database = database.with_settings(backfill_last_n=0, batch_events=batch_events)
    stepper = Stepper(database, monkeypatch)
    with serving(database):
        try:
            stepper.rest()
            yield stepper
        finally:
            stepper.free()


def _play_all(database: Database, stepper: Stepper, worker_steps: int, writers: int) -> int:
    """Every order of the worker's steps and each writer's insert and commit. Returns how many."""
    names = [f"writer {number}" for number in range(writers)]
    played = 0
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(database.session()) for name in names}
        for order in _interleavings({"worker": worker_steps, **dict.fromkeys(names, 2)}):
            # The writers are alike: one order of who begins is enough.
            if sorted(names, key=order.index) != names:
                continue
            stepper.rouse("rouse")
            parties = {n: _transaction(conn, stepper, n) for n, conn in sessions.items()}
            for name in order:
                if name == "worker":
                    stepper.advance()
                else:
                    next(parties[name])
            stepper.finish()
            database.rows("delete from public.iot_events")
            played += 1
    return played


@pytest.mark.parametrize(("worker_steps", "writers"), [(10, 1), (6, 2)])
def test_no_interleaving_of_the_real_statements_loses_a_wake_up(
    database: Database, monkeypatch: pytest.MonkeyPatch, worker_steps: int, writers: int
) -> None:
    """The service's own loop, held before each step: every commit is claimed without a timer."""
    with _stepped_service(database, monkeypatch) as stepper:
        assert _play_all(database, stepper, worker_steps, writers) > 60

        assert stepper.wakes > 10
        assert stepper.looks > 10


@pytest.mark.parametrize(
    ("texts", "batch_events", "opens"),
    [(["a"], 64, False), (["a", "b"], 64, True), (["a"], 1, True)],
)
def test_one_event_alone_leaves_the_gate_closed_and_two_or_a_full_claim_open_it(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    batch_events: int,
    opens: bool,
) -> None:
    """It isn't kept waiting by a statement that would spare others a NOTIFY; a crowd is spared."""
    with _stepped_service(database, monkeypatch, batch_events) as stepper:
        stepper.rouse(*texts)
        stepper.finish()

        assert ("worker: open_gate" in stepper.trace) is opens


def test_the_interleavings_catch_a_trigger_that_does_not_keep_its_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model says of a broken gate is true of Postgres too."""
    name = "listener.queue_inserted()"
    source = database.value("select pg_get_functiondef(%s::regprocedure)", name)
    kept = f"pg_catalog.pg_try_advisory_xact_lock_shared({GATE_KEY})"
    assert kept in source
    dropped = (
        f"(pg_catalog.pg_try_advisory_lock_shared({GATE_KEY}) "
        f"and pg_catalog.pg_advisory_unlock_shared({GATE_KEY}))"
    )
    database.rows(source.replace(kept, dropped))

    with (
        _stepped_service(database, monkeypatch) as stepper,
        pytest.raises(AssertionError, match="slept through a commit"),
    ):
        _play_all(database, stepper, 10, 1)


def test_a_commit_between_a_sleep_and_its_beat_is_not_slept_through(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beat's answer may bring the notification along, and then the socket stays silent."""
    inserted = threading.Event()

    def insert_then_beat(conn: Connection, worker: int | None) -> bool:
        name = conn.info.get_parameters()["application_name"]
        if name == "listener-wake" and is_asleep(database) and not inserted.is_set():
            database.insert("a")
            inserted.set()
        return beat(conn, worker)

    monkeypatch.setattr(service, "beat", insert_then_beat)
    with serving(database):
        inserted.wait(_STEP_SECONDS)

        wait_until(database.embedded, _STEP_SECONDS)
