"""The loop: wake, claim, encode, write; reconnect when the connection is lost."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from listener import notify_systemd, queries
from listener.claim import EventId
from listener.config import Settings
from listener.counters import counters
from listener.database import Connection, connect, reconnecting, translated
from listener.encoding import Encoder
from listener.errors import ConnectionLost, ModelFault, StatementTimeout
from listener.health import health
from listener.install import verify
from listener.logs import log
from listener.pipeline import Pipeline
from listener.queue import Queue
from listener.status import read_backlog
from listener.stop import Stop
from listener.wakeup import Wakeup
from listener.worker import BEAT_SECONDS, Worker, beat

# A page of the sweep: what is new waits for it.
_SWEEP_PAGE, _SWEEP_PAGE_SECONDS = 500, 0.25
# After sessions that end so soon the wait doubles, up to some seconds.
_BRIEF_SECONDS, _MOST_DOUBLINGS = 2.0, 3
# The numbers that systemd shows are as old as this.
_STATUS_SECONDS = 15.0


class Service:
    """One worker."""

    def __init__(self, settings: Settings, encoder: Encoder, stop: Stop) -> None:
        """When `stop` is set, the batch in hand is finished, the next given back, `run` returns."""
        self._settings = settings
        self._encoder = encoder
        self._stop = stop
        self._in_hand: dict[int, list[EventId]] = {}

    def run(self, *, once: bool = False) -> None:
        """Serve until stopped, or with `once` until nothing is due and the sweep is done.

        Raises SchemaError if the database isn't installed, EncoderLost where only a new process
        can go on. Stopped while it connects again, it returns.
        """
        doublings = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._connect_and_serve(once)
            except ConnectionLost as error:
                counters.reconnects += 1
                log(logging.WARNING, "connection_lost", cause=error)
                # A server that accepts connections and then fails must not be hammered.
                was_brief = time.monotonic() - began < _BRIEF_SECONDS
                doublings = min(doublings + 1, _MOST_DOUBLINGS) if was_brief else 0
                self._stop.wait(random.uniform(0.05, 0.5) * 2**doublings)  # noqa: S311  jitter
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
                        _open_session(self._settings, self._encoder, self._stop, self._in_hand)
                    )
            if once:
                session.run_once()
            else:
                with health.serving(self._encoder.fingerprint):
                    session.serve()

    def _wait_for_model(self, error: ModelFault) -> None:
        log(
            logging.ERROR,
            "model_fault",
            cause=error,
            retry_in_seconds=self._settings.poll_seconds,
            parked=0,
        )
        notify_systemd.status("the model can't run; the log says why")
        deadline = time.monotonic() + self._settings.poll_seconds
        while not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            health.progressed()
            self._stop.wait(min(left, BEAT_SECONDS))


@contextmanager
def _open_session(
    settings: Settings, encoder: Encoder, stop: Stop, in_hand: dict[int, list[EventId]]
) -> Iterator[_Session]:
    """Connect twice, register the worker, LISTEN; the queue may be drained from here on."""
    with ExitStack() as stack:
        work = stack.enter_context(connect(settings, "listener-work", as_service=True))
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
        session = _Session(settings, encoder, stop, wakeup, worker, [work, wake], in_hand)
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
        in_hand: dict[int, list[EventId]],
    ) -> None:
        """The first of `connections` does the work."""
        self._stop = stop
        self._wakeup = wakeup
        self._settings = settings
        self._encoder = encoder
        self._worker = worker
        self._connections = deque(connections)
        self._work = connections[0]
        self._queue = Queue(self._work, settings, worker.number if worker else None)
        self._pipeline = Pipeline(settings, self._queue, encoder, stop, in_hand)
        self._next_beat = time.monotonic()
        self._next_status = time.monotonic()
        self._sweep_page_events = _SWEEP_PAGE
        self._sweep_from: str | None = None
        self._sweep_left = settings.backfill_last_n
        self._next_sweep = time.monotonic() if settings.backfill_last_n else float("inf")

    def give_back(self) -> None:
        """What the lost connection left behind: nobody died of it, so no attempt is counted."""
        self._pipeline.give_back()

    def serve(self) -> None:
        log(logging.INFO, "listening", model=self._encoder.fingerprint)
        notify_systemd.ready()
        self._queue.discard_parked()
        while not self._stop.is_set():
            self._after_step()
            seconds = self._wakeup.prepare_sleep()
            # Only now, or a commit could fall between drain and sleep.
            if not self._drain() and not self._sweep_page():
                self._sleep(seconds)

    def run_once(self) -> None:
        while not self._stop.is_set() and (self._drain() or self._sweep_page()):
            pass

    def _drain(self) -> int:
        return self._pipeline.drain(self._stay_awake, self._after_step)

    def _stay_awake(self, is_much: bool) -> None:
        """There is more to do: let writers pass without NOTIFY, and call for help if it is much."""
        self._wakeup.open_gate()
        if is_much:
            self._wakeup.call_help(self._work)

    def _sleep(self, seconds: float) -> None:
        """Sleep in beats, until there is reason to look at the queue or the time is up."""
        deadline = time.monotonic() + min(seconds, self._seconds_to_sweep())
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
            notify_systemd.status(str(read_backlog(self._work)))

    def _sweep_page(self) -> bool:
        """Queue one page of the last N, only when nothing else is due. Returns whether it did.

        A page at a time, so that live events never wait behind a long sweep and the queue stays
        short.
        """
        if self._sweep_left <= 0 or self._seconds_to_sweep() > 0:
            return False
        events = min(self._sweep_page_events, self._sweep_left)
        began = time.monotonic()
        try:
            page = self._queue.sweep(self._encoder.fingerprint, self._sweep_from, events)
        except StatementTimeout as error:
            self._sweep_page_events = max(events // 2, 1)
            if events > 1:
                return True
            # To begin anew at once would meet the same event again.
            log(logging.WARNING, "sweep_given_up", left=self._sweep_left, cause=error)
            self._schedule_sweep()
            return False
        fitting = int(events * _SWEEP_PAGE_SECONDS / max(time.monotonic() - began, 1e-3))
        self._sweep_page_events = min(max(fitting, 1), _SWEEP_PAGE)
        self._sweep_from = page.next_from
        self._sweep_left -= page.scanned
        if page.queued:
            log(logging.INFO, "backfill_queued", scanned=page.scanned, queued=page.queued)
        if page.next_from is None or self._sweep_left <= 0:
            self._schedule_sweep()
        return page.queued > 0 or self._seconds_to_sweep() <= 0

    def _schedule_sweep(self) -> None:
        self._queue.discard_parked()
        self._sweep_from = None
        self._sweep_left = self._settings.backfill_last_n
        wait = self._settings.sweep_seconds or float("inf")
        self._next_sweep = time.monotonic() + wait

    def _seconds_to_sweep(self) -> float:
        return self._next_sweep - time.monotonic()
