"""The overlap of claim, encode and write: while one batch is encoded, the next is claimed."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field

import psycopg

from listener.claim import Claim, Event, EventId
from listener.config import Settings
from listener.counters import counters
from listener.encoding import Encoded, Encoder
from listener.errors import EmbeddingError, EncoderLost, ListenerError, ModelFault
from listener.health import health
from listener.logs import log
from listener.queue import Queue
from listener.stop import Stop

# While a batch is encoded the next is ready; more would only lengthen the leases.
_AHEAD = 2
# A claim is about so long, because among many texts there are more of like length; a batch of it
# is shorter, because a stop and a new event wait for it, and a worker that dies loses it.
_CLAIM_SECONDS, _BATCH_SECONDS = 4.0, 0.25
_SMALLEST_CLAIM, _FIRST_CLAIM = 16, 64
# In tokens. In smaller passes the fixed cost of a pass would show.
_SMALLEST_PASS = 1024
# Commits don't wait for the disk; a crash of the server may undo those of its last moments.
_UNDONE_SECONDS = 2.0
# While the model runs, a stop is noticed this soon.
_LOOK_UP_SECONDS = 0.1


@dataclass(eq=False)
class Batch:
    """Events of a claim on their way through the model, in one pass; `is_last` of its claim.

    `encoding` is pending until the model has it, so that what waits can be cancelled as well.
    """

    claim: Claim
    events: list[Event]
    tokens: int
    is_last: bool
    submitted: float = 0.0
    encoding: Future[Encoded] = field(default_factory=Future)

    @property
    def event_ids(self) -> list[EventId]:
        return [event.event_id for event in self.events]


class Pipeline:
    """Claim → encode → write, for one connection."""

    def __init__(
        self,
        settings: Settings,
        queue: Queue,
        encoder: Encoder,
        stop: Stop,
        in_hand: dict[int, list[EventId]],
    ) -> None:
        """When `stop` is set, the batch in hand is finished and the next given back.

        `in_hand` has the claims, by lease, that are not known to be written or given back for good;
        after a lost connection the caller finds them there.
        """
        self._settings = settings
        self._in_hand = in_hand
        self._queue = queue
        self._encoder = encoder
        self._stop = stop
        self._claim_events = min(_FIRST_CLAIM, settings.batch_events)
        self._most_tokens = min(_SMALLEST_PASS, settings.batch_tokens)
        # Claimed, and not yet given to the model: what is new goes before it.
        self._waiting: deque[Batch] = deque()
        # With the model, in order.
        self._running: deque[Batch] = deque()
        self._more = True
        self._extended = time.monotonic()
        queue.extend_leases = self._extend_leases
        # Events, tokens and seconds of each batch since the last claim ended.
        self._done: list[tuple[int, int, float]] = []
        self._finished = 0.0
        self._written: deque[tuple[float, int]] = deque()

    def drain(self, on_more: Callable[[bool], None], on_batch: Callable[[], object]) -> int:
        """Claim, encode and write until nothing more is due. Returns how many were claimed.

        `on_more` is called at each claim, except a first one of a single event that isn't full; its
        argument is whether the claim is the first and full. `on_batch` is called after each batch.
        Raises ModelFault, with every claim given back, if the model can't run; EncoderLost, with
        what it hasn't begun given back; ConnectionLost, SchemaError and psycopg.Error, with all
        left in hand.
        """
        claimed, self._more = 0, True
        try:
            while True:
                while claim := self._claim():
                    self._start()
                    if claimed > 0 or claim.is_full or len(claim.event_ids) > 1:
                        on_more(claimed == 0 and claim.is_full)
                    claimed += len(claim.event_ids)
                self._start()
                if not self._running:
                    return claimed
                self._await_first()
                self._finish(self._running.popleft())
                on_batch()
        except ModelFault:
            for batch in self._running:
                batch.encoding.cancel()
            self._running.clear()
            self._waiting.clear()
            self.give_back()
            self._queue.notify()
            raise
        except EncoderLost:
            # If this fails the leases run out by themselves; the process must end in any case.
            with suppress(ListenerError, psycopg.Error):
                self._give_back_unstarted()
            raise

    def give_back(self) -> None:
        """Release all that is in hand, from this session or from one before."""
        for lease, event_ids in list(self._in_hand.items()):
            self._queue.release(lease, event_ids)
            # Only now: if the connection breaks meanwhile, it is still in hand.
            del self._in_hand[lease]

    def _claim(self) -> Claim | None:
        """More to do, if there is room for it: what is new goes before what waits."""
        in_hand = [*self._running, *self._waiting]
        # One that kills the process shall not cost another an attempt.
        is_suspect = any(batch.claim.is_suspect for batch in in_hand)
        if self._stop.is_set() or is_suspect or len(self._running) >= _AHEAD:
            return None
        claim = None
        if not self._waiting:
            claim = self._queue.claim(self._claim_events) if self._more else None
            # All of a claim may have been parked by it.
            self._more = claim is not None and (
                claim.is_full or claim.is_suspect or not claim.event_ids
            )
        elif not self._waiting[0].claim.is_new:
            claim = self._queue.claim_changes(self._claim_events)
            self._more = self._more or (claim is not None and claim.is_full)
        if claim is not None:
            self._waiting.extendleft(reversed(self._cut(claim)))
        return claim

    def _cut(self, claim: Claim) -> list[Batch]:
        """The claim's events as batches, a pass each; an empty one if there are none."""
        self._in_hand[claim.lease] = claim.event_ids
        events = self._queue.read(claim)
        passes = self._encoder.plan([event.text for event in events], self._most_tokens)
        return [
            Batch(claim, [events[i] for i in one.indices], one.tokens, is_last=one is passes[-1])
            for one in passes
        ]

    def _start(self) -> None:
        """Give the model what it can work on next."""
        if self._stop.is_set():
            self._give_back_unstarted()
        while self._waiting and len(self._running) < _AHEAD:
            batch = self._waiting[0]
            is_suspect = batch.claim.is_suspect
            if is_suspect and self._running and self._running[-1].claim is not batch.claim:
                return
            self._waiting.popleft()
            batch.submitted = time.monotonic()
            batch.encoding = self._encoder.submit([event.text for event in batch.events])
            self._running.append(batch)

    def _await_first(self) -> None:
        """Wait for the first batch's vectors; extend leases, and on a stop give the rest back."""
        first = self._running[0]
        self._extend_leases()
        while not wait([first.encoding], timeout=_LOOK_UP_SECONDS).done:
            # A long encode is no hang; one that takes too long is ended below.
            health.progressed()
            if self._stop.is_set():
                self._give_back_unstarted()
            if self._seconds_in_hand(first) > self._settings.encode_seconds:
                raise EncoderLost(
                    f"the model has not returned for {self._settings.encode_seconds:.0f} s with "
                    f"{len(first.events)} events, the first {first.event_ids[0]}; "
                    "the process ends, to be started again"
                )
            self._extend_leases()

    def _extend_leases(self) -> None:
        if time.monotonic() - self._extended < self._settings.lease_seconds / 3:
            return
        self._extended = time.monotonic()
        written = {lease for _, lease in self._written}
        for lease, event_ids in self._in_hand.items():
            if lease not in written:
                self._queue.extend(lease, event_ids)

    def _finish(self, batch: Batch) -> None:
        """Store and acknowledge what the model gave; fail what it refused."""
        encoded = batch.encoding.result()
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
        seconds = self._seconds_in_hand(batch)
        self._finished = time.monotonic()
        self._done.append((len(batch.events), batch.tokens, seconds))
        if batch.is_last:
            self._end_claim(batch.claim.lease)
        counters.batch(len(batch.events), encoded.encoded, encoded.reused)
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

    def _end_claim(self, lease: int) -> None:
        self._written.append((self._finished, lease))
        while self._finished - self._written[0][0] > _UNDONE_SECONDS:
            self._in_hand.pop(self._written.popleft()[1], None)
        self._adapt()

    def _seconds_in_hand(self, batch: Batch) -> float:
        """How long so far; its predecessor's encode is not its own time."""
        return time.monotonic() - max(batch.submitted, self._finished)

    def _fail(self, batch: Batch, encoded: Encoded) -> int:
        return sum(
            self._queue.fail(batch.claim.lease, [event.event_id], str(result))
            for event, result in zip(batch.events, encoded.results, strict=True)
            if isinstance(result, EmbeddingError)
        )

    def _give_back_unstarted(self) -> None:
        """Release the batches whose encode hasn't begun."""
        left = len(self._running) + len(self._waiting)
        for batch in (*list(self._running)[1:], *self._waiting):
            if batch.encoding.cancel():
                self._queue.release(batch.claim.lease, batch.event_ids)
                (self._running if batch in self._running else self._waiting).remove(batch)
        if len(self._running) + len(self._waiting) < left:
            self._queue.notify()

    def _adapt(self) -> None:
        """Size the next claim, and a pass of it, by how long they will take."""
        events, tokens, seconds = (sum(one) for one in zip(*self._done, strict=True))
        self._done.clear()
        if not events:
            # All were deleted, which tells nothing of the model.
            return
        per_second = 1 / max(seconds, 1e-3)
        wanted = min(int(events * per_second * _CLAIM_SECONDS), self._claim_events * 2)
        self._claim_events = min(max(wanted, _SMALLEST_CLAIM), self._settings.batch_events)
        if tokens:
            wanted = min(int(tokens * per_second * _BATCH_SECONDS), self._most_tokens * 2)
            self._most_tokens = min(max(wanted, _SMALLEST_PASS), self._settings.batch_tokens)
