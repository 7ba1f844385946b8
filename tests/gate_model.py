"""A model of the sleep gate, small enough to look at every interleaving of it.

Writers and workers are programs of atomic steps: one for each SQL statement of the trigger and of
listener/wakeup.py, and three for a commit, in the order in which Postgres does them: the row
becomes visible, the locks are released, the notification is delivered. Between any two steps any
other session may go on.

Timers (the poll, a retry, a follower's look each second) may fire at any moment, and the leader's
session may die; but while a leader lives no timer is counted on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

# Where a worker is outside its program: a follower's drain and nap, the way back to the gate after
# a last drain that found something, and the two stages of a death.
FOLLOWS, NAPS, RETURNS = "follower's last drain", "nap", "open and return"
DYING, DEAD = "dying", "dead"


@dataclass(frozen=True)
class Protocol:
    """The order of the steps; by default that of the real code."""

    writer: tuple[str, ...] = ("insert", "try", "show", "release", "deliver")
    worker: tuple[str, ...] = ("clear", "lead", "listen", "lock", "last drain", "sleep")
    sleeps_without_the_gate: bool = False
    hears_only_the_socket: bool = False


@dataclass(frozen=True)
class World:
    """Who takes part, beside two workers. Each commit is one run of the writer's program."""

    writers: int = 1
    commits: int = 2
    deaths: int = 1


class Writer(NamedTuple):
    """A session that inserts."""

    commits_left: int
    at: int = 0
    # Holds the gate's lock shared.
    trusts: bool = False
    notifies: bool = False
    # The worker that listened when the row became visible.
    addressee: int | None = None


class Worker(NamedTuple):
    """A worker and its session."""

    at: str = "lead"
    # Got the gate when it last tried, and so means to sleep until a notification.
    is_patient: bool = False
    listens: bool = False
    # A notification has come; `in_driver`: another statement's answer brought it off the socket.
    in_socket: bool = False
    in_driver: bool = False


class State(NamedTuple):
    """All that a step can depend on."""

    writers: tuple[Writer, ...]
    workers: tuple[Worker, ...]
    deaths_left: int
    # A committed row that nobody has claimed.
    is_pending: bool = False
    # The workers that hold the two keys.
    gate: int | None = None
    leader: int | None = None

    def with_writer(self, number: int, writer: Writer) -> State:
        return self._replace(writers=_replaced(self.writers, number, writer))

    def with_worker(self, number: int, **changes: Any) -> State:
        worker = self.workers[number]._replace(**changes)
        return self._replace(workers=_replaced(self.workers, number, worker))


Steps = Iterator[tuple[str, State]]


def _replaced(items: tuple[Any, ...], number: int, item: Any) -> tuple[Any, ...]:
    return (*items[:number], item, *items[number + 1 :])


def steps(protocol: Protocol, state: State) -> Steps:
    """Whatever may happen next, with the state that it leads to."""
    for number, writer in enumerate(state.writers):
        if writer.commits_left:
            for label, after in _write(protocol, state, number, writer):
                yield f"writer {number}: {label}", after
    for number, worker in enumerate(state.workers):
        for label, after in _work(protocol, state, number, worker):
            yield f"worker {number}: {label}", after
        if state.deaths_left and state.leader == number:
            yield f"worker {number}: die", _die(state, number)


def _write(protocol: Protocol, state: State, number: int, writer: Writer) -> Steps:
    step = protocol.writer[writer.at]
    next_transaction = Writer(writer.commits_left - 1)
    is_last = writer.at + 1 == len(protocol.writer)
    after = next_transaction if is_last else writer._replace(at=writer.at + 1)
    if step == "show":
        yield "roll back", state.with_writer(number, next_transaction)
        listeners = (n for n, worker in enumerate(state.workers) if worker.listens)
        after = after._replace(addressee=next(listeners, None) if writer.notifies else None)
        state = state._replace(is_pending=True)
    elif step == "try" and state.gate is None:
        after = after._replace(trusts=True)
    elif step in ("try", "try and unlock") and state.gate is not None:
        after = after._replace(notifies=True)
    elif step == "release":
        after = after._replace(trusts=False)
    elif step == "deliver" and writer.addressee is not None:
        state = state.with_worker(writer.addressee, in_socket=True)
    yield step, state.with_writer(number, after)


def _work(protocol: Protocol, state: State, number: int, worker: Worker) -> Steps:
    if worker.at == "sleep":
        yield from _sleep(protocol, state, number, worker)
    elif worker.at in (DYING, DEAD):
        yield from _end(state, number, worker)
    elif worker.at == NAPS:
        yield "look after a second", state.with_worker(number, at="lead")
    elif worker.at == FOLLOWS:
        claimed = "lead" if state.is_pending else NAPS
        yield FOLLOWS, state.with_worker(number, at=claimed)._replace(is_pending=False)
    elif worker.at == RETURNS:
        yield RETURNS, _opened(state, number).with_worker(number, at="lead")
        # Of an event alone.
        yield "return", state.with_worker(number, at="lead")
    else:
        place = protocol.worker.index(worker.at)
        ready = state.with_worker(number, at=protocol.worker[place + 1])
        yield worker.at, _statement(protocol, state, ready, number, worker.at)


def _statement(protocol: Protocol, state: State, ready: State, number: int, step: str) -> State:
    """The state after one statement of a worker's program; `ready` is at the next one."""
    if step == "clear":
        return ready.with_worker(number, in_socket=False, in_driver=False)
    if step.startswith("open"):
        return _opened(ready, number)
    if step == "last drain" and state.is_pending:
        return state.with_worker(number, at=RETURNS)._replace(is_pending=False)
    if step in ("drain", "last drain", "drain before lock"):
        return ready._replace(is_pending=False)
    if step == "lead":
        if state.leader not in (None, number):
            return state.with_worker(number, at=FOLLOWS)
        return ready._replace(leader=number)
    if step == "listen":
        return ready.with_worker(number, listens=True)
    assert step == "lock"
    is_held = state.gate not in (None, number) or any(w.trusts for w in state.writers)
    is_patient = not is_held or protocol.sleeps_without_the_gate
    ready = ready.with_worker(number, is_patient=is_patient)
    return ready if is_held else ready._replace(gate=number)


def _sleep(protocol: Protocol, state: State, number: int, worker: Worker) -> Steps:
    if _is_called(protocol, worker):
        yield "wake", state.with_worker(number, at=protocol.worker[0])
    yield ("timer" if worker.is_patient else "look again"), state.with_worker(number, at="lead")
    if worker.in_socket:
        yield "ping", state.with_worker(number, in_socket=False, in_driver=True)


def _is_called(protocol: Protocol, worker: Worker) -> bool:
    return worker.in_socket or (worker.in_driver and not protocol.hears_only_the_socket)


def _opened(state: State, number: int) -> State:
    return state._replace(gate=None) if state.gate == number else state


def _die(state: State, number: int) -> State:
    """The server learns of it later, key by key; what was on its way to the worker is lost."""
    writers = (
        w._replace(addressee=None if w.addressee == number else w.addressee) for w in state.writers
    )
    state = state.with_worker(number, **Worker(DYING)._asdict())
    return state._replace(writers=tuple(writers), deaths_left=state.deaths_left - 1)


def _end(state: State, number: int, worker: Worker) -> Steps:
    if state.leader == number:
        yield "leader's key is freed", state._replace(leader=None)
    if state.gate == number:
        yield "gate's key is freed", state._replace(gate=None)
    if worker.at == DYING and number not in (state.leader, state.gate):
        yield "be gone", state.with_worker(number, at=DEAD)
    if worker.at == DEAD:
        yield "start again", state.with_worker(number, at="lead")


def is_lost(protocol: Protocol, state: State) -> bool:
    """Whether a committed row waits and nothing but a timer will make the leader look."""
    if not state.is_pending or state.leader is None:
        return False
    leader = state.workers[state.leader]
    return (
        leader.at == "sleep"
        and leader.is_patient
        and not _is_called(protocol, leader)
        and all(w.addressee != state.leader for w in state.writers)
        and all(
            worker.at in (NAPS, DYING, DEAD)
            for number, worker in enumerate(state.workers)
            if number != state.leader
        )
    )


@dataclass
class Exploration:
    """Every state reached, with the one before it, and the first in which a wake-up is lost."""

    reached: dict[State, tuple[str, State | None]]
    lost: State | None

    def trace(self) -> str:
        """The shortest way to the lost wake-up, a step a line."""
        labels: list[str] = []
        state = self.lost
        while state is not None:
            label, state = self.reached[state]
            labels.append(label)
        return "\n".join(reversed(labels))


def explore(protocol: Protocol, world: World) -> Exploration:
    """Breadth first through all interleavings, or up to the first lost wake-up."""
    start = State((Writer(world.commits),) * world.writers, (Worker(),) * 2, world.deaths)
    reached: dict[State, tuple[str, State | None]] = {start: ("start", None)}
    unexplored = deque([start])
    while unexplored:
        state = unexplored.popleft()
        if is_lost(protocol, state):
            return Exploration(reached, state)
        for label, after in steps(protocol, state):
            if after not in reached:
                reached[after] = (label, state)
                unexplored.append(after)
    return Exploration(reached, None)


def _worker(steps: str) -> Protocol:
    return Protocol(worker=tuple(steps.split(", ")))


# Each loses a wake-up.
BROKEN = {
    "the gate is released after the last drain, before the sleep": _worker(
        "clear, lead, listen, lock, last drain, open early, sleep"
    ),
    "the last drain comes before the lock": _worker(
        "clear, lead, listen, drain before lock, lock, sleep"
    ),
    "no last drain": _worker("clear, open, drain, lead, listen, lock, sleep"),
    "no last drain, and the gate is released after the drain": _worker(
        "clear, drain, open, lead, listen, lock, sleep"
    ),
    "notifications are cleared after the last drain": _worker(
        "lead, listen, lock, last drain, clear, sleep"
    ),
    "a new leader listens after its last drain": _worker(
        "clear, lead, lock, last drain, listen, sleep"
    ),
    "the worker sleeps although it did not get the gate": Protocol(sleeps_without_the_gate=True),
    "the sleep hears only the socket, emptied by a ping": Protocol(hears_only_the_socket=True),
    "the writer releases its lock before its commit is visible": Protocol(
        writer=("insert", "try", "release", "show", "deliver")
    ),
    "the writer tries the lock without keeping it": Protocol(
        writer=("insert", "try and unlock", "show", "deliver")
    ),
}

# None of them does: the drain behind the closed gate makes up for it.
HARMLESS = {
    "the gate is opened, and there is a drain before it is closed again": _worker(
        "clear, open, drain, lead, listen, lock, last drain, sleep"
    ),
    "the gate is opened after such a drain": _worker(
        "clear, drain, open, lead, listen, lock, last drain, sleep"
    ),
    "notifications are cleared after such a drain": _worker(
        "open, drain, clear, lead, listen, lock, last drain, sleep"
    ),
}
