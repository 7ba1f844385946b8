"""The loop: wake, claim, encode, write; reconnect when the connection is lost."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import psycopg

from listener import notify_systemd, queries
from listener.claim import EventId
from listener.config import Settings
from listener.counters import counters
from listener.database import Connection, cause_of, connect, reconnecting, translated
from listener.encoding import Encoder
from listener.errors import (
    ConnectionLost,
    ListenerError,
    LostOverEvents,
    ModelFault,
    SchemaError,
    SweepGivenUp,
)
from listener.health import health
from listener.install import verify
from listener.logs import log
from listener.pipeline import Pipeline
from listener.queue import Queue
from listener.status import read_backlog
from listener.stop import Stop
from listener.sweep import Sweep
from listener.upkeep import discard_parked
from listener.wakeup import Wakeup
from listener.worker import BEAT_SECONDS, Worker, beat

# After sessions that end so soon the wait doubles, up to some seconds.
_BRIEF_SECONDS, _MOST_DOUBLINGS = 2.0, 3
# To lose the connection over an event so many times may still be chance.
_BY_CHANCE = 2
# Where events never cease, a page of the sweep comes this often, or takes a quarter of the time.
_TURN_SECONDS = 1.0
# The numbers that systemd shows are as old as this.
_STATUS_SECONDS = 15.0


@dataclass
class _Kept:
    """What outlives a connection.

    `losses`: how often one was lost over each event; of a suspect for good, of others until nothing
    is left to do.
    `has_drained`: nothing was left to do once since the process began, or since a connection was
    lost over events; until then an event that waits may be the cause.
    """

    sweep: Sweep
    in_hand: dict[int, list[EventId]] = field(default_factory=dict)
    losses: Counter[EventId] = field(default_factory=Counter)
    has_drained: bool = False


class Service:
    """One worker."""

    def __init__(self, settings: Settings, encoder: Encoder, stop: Stop) -> None:
        """When `stop` is set, the batch in hand is finished, the next given back, `run` returns."""
        self._settings = settings
        self._encoder = encoder
        self._stop = stop
        self._kept = _Kept(Sweep(settings))

    def run(self, *, once: bool = False) -> None:
        """Serve until stopped, or with `once` until nothing is due and the sweep is done.

        Raises SchemaError if the database isn't installed, EncoderLost where only a new process
        can go on, SweepGivenUp at the end of `once`. Stopped while it connects again, it returns.
        """
        doublings = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._connect_and_serve(once)
            except (ConnectionLost, psycopg.Error) as error:
                counters.reconnects += 1
                self._suspect(error)
                # A server that accepts connections and then fails must not be hammered.
                was_brief = time.monotonic() - began < _BRIEF_SECONDS
                doublings = min(doublings + 1, _MOST_DOUBLINGS) if was_brief else 0
                seconds = random.uniform(0.05, 0.5) * 2**doublings  # noqa: S311  jitter
                log(
                    logging.WARNING,
                    "connection_lost",
                    cause=cause_of(error),
                    retry_in_seconds=seconds,
                )
                self._stop.wait(seconds)
                continue
            except ModelFault as error:
                self._wait_for_model(error)
                continue
            if once:
                return

    def _connect_and_serve(self, once: bool) -> None:
        with ExitStack() as stack:
            for attempt in reconnecting(self._stop):
                with attempt:
                    # A database that is down is no hang.
                    health.progressed()
                    notify_systemd.status("connecting to Postgres")
                    session = stack.enter_context(
                        _open_session(self._settings, self._encoder, self._stop, self._kept)
                    )
            try:
                if once:
                    session.run_once()
                else:
                    with health.serving(self._encoder.fingerprint):
                        session.serve()
            except SchemaError:
                # Not the fault of the events in hand: no attempt is counted.
                with suppress(ListenerError, psycopg.Error):
                    session.give_back()
                raise

    def _suspect(self, error: ConnectionLost | psycopg.Error) -> None:
        """Leave as a dead worker's the events on which the database seems to fail.

        So the one to blame is found, and parked, as one that kills the process is.
        """
        kept = self._kept
        if isinstance(error, LostOverEvents):
            event_ids = error.event_ids
        elif isinstance(error, psycopg.Error):
            # Neither bisected nor a connection that is known to be lost: any may be the cause.
            event_ids = [one for claimed in kept.in_hand.values() for one in claimed]
        else:
            return
        kept.has_drained = False
        kept.losses.update(event_ids)
        suspects = {one for one in event_ids if kept.losses[one] > _BY_CHANCE}
        kept.in_hand = {
            lease: [one for one in claimed if one not in suspects]
            for lease, claimed in kept.in_hand.items()
        }

    def _wait_for_model(self, error: ModelFault) -> None:
        log(
            logging.ERROR,
            "model_fault",
            cause=error,
            retry_in_seconds=self._settings.poll_seconds,
        )
        notify_systemd.status("the model can't run; the log says why")
        deadline = time.monotonic() + self._settings.poll_seconds
        while not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            health.progressed()
            self._stop.wait(min(left, BEAT_SECONDS))


@contextmanager
def _open_session(
    settings: Settings, encoder: Encoder, stop: Stop, kept: _Kept
) -> Iterator[_Session]:
    """Connect twice, LISTEN, register the worker; the queue may be drained from here on."""
    with ExitStack() as stack:
        work = stack.enter_context(connect(settings, "listener-work", as_service=True))
        health.progressed()
        wake = stack.enter_context(connect(settings, "listener-wake", as_service=True))
        verify(work)
        wakeup = Wakeup(wake, stop, settings.notify, settings.poll_seconds)
        stack.callback(wakeup.close)
        worker = None
        # LISTEN before the drain: a row committed between the two would wait for the next poll.
        if wakeup.listen(work):
            with translated():
                for conn in (work, wake):
                    conn.execute(queries.SERVICE_SESSION)
            worker = stack.enter_context(Worker.registered(work, encoder.fingerprint))
        else:
            # Behind a transaction pooler a statement prepared on one server is unknown to the next.
            work.prepare_threshold = wake.prepare_threshold = None
        session = _Session(settings, encoder, stop, wakeup, worker, [work, wake], kept)
        session.give_back()
        yield session


class _Session:
    """What holds from one connect to the next loss of the connection."""

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        stop: Stop,
        wakeup: Wakeup,
        worker: Worker | None,
        connections: list[Connection],
        kept: _Kept,
    ) -> None:
        """The first of `connections` does the work."""
        self._stop = stop
        self._wakeup = wakeup
        self._settings = settings
        self._encoder = encoder
        self._worker = worker
        self._connections = deque(connections)
        self._work = connections[0]
        number = worker.number if worker else None
        self._queue = Queue(self._work, settings, number, reads_apart=not kept.has_drained)
        self._pipeline = Pipeline(settings, self._queue, encoder, stop, kept.in_hand)
        self._kept = kept
        self._next_beat = time.monotonic()
        self._next_turn = time.monotonic()
        self._next_status = time.monotonic()

    def give_back(self) -> None:
        """What the lost connection left behind: nobody died of it, so no attempt is counted."""
        self._pipeline.give_back()

    def serve(self) -> None:
        log(logging.INFO, "listening", model=self._encoder.fingerprint)
        notify_systemd.ready()
        discard_parked(self._work)
        while not self._stop.is_set():
            self._after_step()
            seconds = self._wakeup.prepare_sleep()
            # After the gate is closed, or a commit could fall between drain and sleep.
            was_busy = self._drain() > 0
            if was_busy and time.monotonic() < self._next_turn:
                continue
            began = time.monotonic()
            is_more = self._sweep_page()
            took = time.monotonic() - began
            self._next_turn = began + took + max(_TURN_SECONDS, 3 * took)
            if not is_more and not was_busy:
                self._sleep(seconds)

    def run_once(self) -> None:
        while not self._stop.is_set() and (self._drain() or self._sweep_page()):
            pass
        if failure := self._kept.sweep.failure:
            raise SweepGivenUp(f"sweep_given_up {failure}; see Troubleshooting in README")

    def _drain(self) -> int:
        claimed = self._pipeline.drain(self._stay_awake, self._after_step)
        self._kept.has_drained = True
        # These went through; who is suspected may be still to come.
        losses = self._kept.losses
        self._kept.losses = Counter({one: n for one, n in losses.items() if n > _BY_CHANCE})
        return claimed

    def _sweep_page(self) -> bool:
        """When nothing else is due, or it is its turn. Returns whether there is more to do."""
        return self._kept.sweep.page(self._work, self._queue, self._encoder.fingerprint)

    def _stay_awake(self, is_much: bool) -> None:
        """There is more to do: let writers pass without NOTIFY, and call for help if it is much."""
        self._wakeup.open_gate()
        if is_much:
            self._wakeup.call_help(self._work)

    def _sleep(self, seconds: float) -> None:
        """Sleep in beats, until there is reason to look at the queue or the time is up."""
        deadline = time.monotonic() + min(seconds, self._kept.sweep.seconds_left())
        while not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            self._tell_progress()
            to_beat = max(self._next_beat - time.monotonic(), 0.0)
            if self._wakeup.sleep(min(left, to_beat)) or self._beat():
                return

    def _beat(self) -> bool:
        """Release what dead workers hold. Returns whether anything is due."""
        if time.monotonic() < self._next_beat:
            return False
        self._next_beat = time.monotonic() + BEAT_SECONDS
        if self._worker is not None:
            self._worker.be_seen()
            self._wakeup.take_notes()
        # In turn: a dead link would be as silent as a quiet day; asking finds out.
        self._connections.rotate()
        return beat(self._connections[0], self._worker.number if self._worker else None)

    def _after_step(self) -> None:
        self._tell_progress()
        self._beat()

    def _tell_progress(self) -> None:
        """The loop got on; and systemd hears every 15 s what is left to do."""
        health.progressed()
        if notify_systemd.is_there() and time.monotonic() >= self._next_status:
            self._next_status = time.monotonic() + _STATUS_SECONDS
            notify_systemd.status(read_backlog(self._work))
