"""The loop: wake, claim, encode, write; reconnect when the connection is lost."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from listener import notify_systemd
from listener.config import Settings
from listener.database import Connection, connect, reconnecting
from listener.encoding import Encoded, Encoder
from listener.errors import ConnectionLost, EmbeddingError, ModelFault
from listener.install import verify
from listener.logs import log
from listener.queue import Claim, Event, Queue
from listener.wakeup import Stop, Wakeup
from listener.worker import Worker

# While a batch is encoded the next is claimed; more would only lengthen the leases.
_AHEAD = 2
# A batch this long keeps a new event's wait behind a backfill, and a stop, well under a second.
_BATCH_SECONDS = 0.5
_SMALLEST_BATCH = 16
# Dead peers are looked for this often: twice a second would be felt, ten seconds is too long.
_BEAT_SECONDS = 1.5
_SWEEP_PAGE = 2_000


@dataclass
class Batch:
    """A claim on its way through the model."""

    claim: Claim
    events: list[Event]
    encoding: Future[Encoded]
    started: float


class Service:
    """One worker."""

    def __init__(self, settings: Settings, encoder: Encoder, stop: Stop) -> None:
        """When `stop` is set, the batch in hand is finished, the next given back, `run` returns."""
        self._settings = settings
        self._encoder = encoder
        self._stop = stop

    def run(self, *, once: bool = False) -> None:
        """Serve until stopped, or with `once` until nothing is due and the sweep is done.

        Raises SchemaError if the database isn't installed, ConnectionLost only when stopped
        while reconnecting.
        """
        while not self._stop.is_set():
            try:
                self._connect_and_serve(once)
            except ConnectionLost as error:
                log(logging.WARNING, "connection_lost", cause=error)
                # A server that accepts connections and then fails must not be hammered.
                self._stop.wait(random.uniform(0.05, 0.5))  # noqa: S311  jitter
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
                    session = stack.enter_context(
                        _open_session(self._settings, self._encoder, self._stop)
                    )
            if once:
                session.run_once()
            else:
                session.serve()

    def _wait_for_model(self, error: ModelFault) -> None:
        log(
            logging.ERROR,
            "model_fault",
            cause=error,
            retry_in_seconds=self._settings.poll_seconds,
            parked=0,
        )
        self._stop.wait(self._settings.poll_seconds)


@contextmanager
def _open_session(settings: Settings, encoder: Encoder, stop: Stop) -> Iterator[_Session]:
    """Connect twice, register the worker, LISTEN; the queue may be drained from here on."""
    with ExitStack() as stack:
        work = stack.enter_context(connect(settings, "listener-work"))
        wake = stack.enter_context(connect(settings, "listener-wake"))
        verify(work)
        wakeup = Wakeup(wake, stop, settings.notify, settings.poll_seconds)
        stack.callback(wakeup.close)
        worker = None
        # LISTEN before the drain: a row committed between the two would wait for the next poll.
        if wakeup.listen(work):
            worker = stack.enter_context(Worker.registered(work, encoder.fingerprint))
        else:
            # Behind a transaction pooler a statement prepared on one server is unknown to the next.
            work.prepare_threshold = None
        yield _Session(settings, encoder, stop, wakeup, worker, work)


class _Session:
    """What holds from one connect to the next loss of the connection."""

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        stop: Stop,
        wakeup: Wakeup,
        worker: Worker | None,
        work: Connection,
    ) -> None:
        self._stop = stop
        self._wakeup = wakeup
        self._settings = settings
        self._encoder = encoder
        self._worker = worker
        self._work = work
        self._queue = Queue(work, settings, worker.number if worker else None)
        self._batch_events = _SMALLEST_BATCH * 4
        self._sweep_from: str | None = None
        self._sweep_left = settings.backfill_last_n
        self._next_sweep = time.monotonic() if settings.backfill_last_n else float("inf")

    def serve(self) -> None:
        log(logging.INFO, "listening", model=self._encoder.fingerprint)
        notify_systemd.ready()
        self._queue.discard_parked()
        woken = True
        while not self._stop.is_set():
            if woken:
                self._drain()
            seconds = self._wakeup.prepare_sleep()
            # The one more drain, without which a commit could fall between drain and sleep.
            if self._drain() or self._sweep_page():
                woken = False
                continue
            woken = self._sleep(seconds)
            self._wakeup.open_gate()

    def run_once(self) -> None:
        while not self._stop.is_set() and (self._drain() or self._sweep_page()):
            pass

    def _sleep(self, seconds: float) -> bool:
        """Sleep in beats. Returns whether there is reason to look at the queue."""
        retry = self._queue.seconds_to_retry()
        deadline = time.monotonic() + min(seconds, retry, self._seconds_to_sweep())
        while not self._stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._wakeup.sleep(min(left, _BEAT_SECONDS)):
                return True
            if left > _BEAT_SECONDS and self._beat():
                return True
        return False

    def _beat(self) -> bool:
        """Release what dead workers hold. Returns whether there was any."""
        return self._worker is not None and self._worker.beat() > 0

    # --- drain -----------------------------------------------------------------------------

    def _drain(self) -> int:
        """Claim, encode and write until nothing more is due. Returns how many were claimed."""
        claimed = 0
        batches: deque[Batch] = deque()
        more = True
        try:
            while True:
                while more and len(batches) < _AHEAD and not self._stop.is_set():
                    batch, more = self._next_batch(first=claimed == 0)
                    if batch is not None:
                        claimed += len(batch.claim.event_ids)
                        batches.append(batch)
                if not batches or (self._stop.is_set() and self._give_back_unstarted(batches)):
                    return claimed
                self._finish(batches[0])
                batches.popleft()
        except ModelFault:
            for batch in batches:
                batch.encoding.cancel()
                self._queue.release(batch.claim.lease, batch.claim.event_ids)
            raise

    def _next_batch(self, *, first: bool) -> tuple[Batch | None, bool]:
        """Claim, read and hand over to the model. The second value: whether more may be due."""
        asked = self._batch_events
        claim = self._queue.claim(asked)
        if claim is None:
            return None, False
        if first:
            self._wakeup.open_gate()
        full = len(claim.event_ids) >= asked
        if first and full:
            self._wakeup.call_help(self._work)
        events = self._queue.read(claim)
        encoding = self._encoder.submit([event.text for event in events])
        more = full or claim.retried
        return Batch(claim, events, encoding, time.monotonic()), more

    def _finish(self, batch: Batch) -> None:
        """Wait for the vectors, extending the leases meanwhile, then store and acknowledge."""
        while True:
            try:
                encoded = batch.encoding.result(timeout=self._settings.lease_seconds / 3)
                break
            except TimeoutError:
                self._queue.extend(batch.claim.lease, batch.claim.event_ids)
        good = [
            (event, result)
            for event, result in zip(batch.events, encoded.results, strict=True)
            if not isinstance(result, EmbeddingError)
        ]
        stored = len(
            self._queue.write(
                batch.claim.lease,
                [event for event, _ in good],
                [vector for _, vector in good],
                self._encoder.fingerprint,
            )
        )
        failed = self._fail(batch, encoded)
        seconds = time.monotonic() - batch.started
        self._adapt(len(batch.events), seconds)
        log(
            logging.INFO,
            "batch_stored",
            events=stored,
            encoded=encoded.encoded,
            reused=encoded.reused,
            failed=failed,
            outdated=len(good) - stored,
            seconds=seconds,
        )

    def _fail(self, batch: Batch, encoded: Encoded) -> int:
        lease = batch.claim.lease
        return sum(
            self._queue.fail(lease, [event.event_id], str(result))
            for event, result in zip(batch.events, encoded.results, strict=True)
            if isinstance(result, EmbeddingError)
        )

    def _give_back_unstarted(self, batches: deque[Batch]) -> bool:
        """On a stop: release the claims whose encode hasn't begun. Returns whether none is left."""
        for batch in [batch for batch in batches if batch.encoding.cancel()]:
            self._queue.release(batch.claim.lease, batch.claim.event_ids)
            batches.remove(batch)
        return not batches

    def _adapt(self, events: int, seconds: float) -> None:
        """Size the next batch so that it takes about half a second."""
        wanted = int(events / max(seconds, 1e-3) * _BATCH_SECONDS)
        bounded = max(min(wanted, self._batch_events * 2), _SMALLEST_BATCH)
        self._batch_events = min(bounded, self._settings.batch_events)

    # --- sweep -----------------------------------------------------------------------------

    def _sweep_page(self) -> bool:
        """Queue one page of the last N, only when nothing else is due. Returns whether it did.

        A page at a time, so that live events never wait behind a long sweep and the queue stays
        short.
        """
        if self._sweep_left <= 0 or self._seconds_to_sweep() > 0:
            return False
        events = min(_SWEEP_PAGE, self._sweep_left)
        page = self._queue.sweep(self._encoder.fingerprint, self._sweep_from, events)
        self._sweep_from = page.next_from
        self._sweep_left -= page.scanned
        if page.queued:
            log(logging.INFO, "backfill_queued", scanned=page.scanned, queued=page.queued)
        if page.next_from is None or self._sweep_left <= 0:
            self._schedule_sweep()
        return page.queued > 0 or self._seconds_to_sweep() <= 0

    def _schedule_sweep(self) -> None:
        self._sweep_from = None
        self._sweep_left = self._settings.backfill_last_n
        wait = self._settings.sweep_seconds or float("inf")
        self._next_sweep = time.monotonic() + wait

    def _seconds_to_sweep(self) -> float:
        return self._next_sweep - time.monotonic()
