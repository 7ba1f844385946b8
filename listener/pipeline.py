"""The overlap of claim, encode and write: while one batch is encoded, the next is claimed."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from listener.config import Settings
from listener.counters import counters
from listener.encoding import Encoded, Encoder
from listener.errors import EmbeddingError, EncodeHung, ModelFault
from listener.health import health
from listener.logs import log
from listener.queue import Claim, Event, EventId, Queue
from listener.stop import Stop

# While a batch is encoded the next is ready; more would only lengthen the leases.
_AHEAD = 2
# A claim is about so long, because among many texts there are more of like length; a batch of it
# is shorter, because a stop waits for it, and a worker that dies loses it.
_CLAIM_SECONDS, _BATCH_SECONDS = 1.0, 0.25
_SMALLEST_CLAIM, _FIRST_CLAIM = 16, 64
_SMALLEST_BATCH, _FIRST_BATCH = 8, 16
# Commits don't wait for the disk; a crash of the server may undo those of its last moments.
_UNDONE_SECONDS = 2.0
# While the model runs, a stop is noticed this soon.
_LOOK_UP_SECONDS = 0.1


@dataclass
class Batch:
    """Events of a claim on their way through the model; `is_last` of the claim's batches."""

    lease: int
    events: list[Event]
    encoding: Future[Encoded]
    submitted: float
    is_last: bool

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
        self._batch_events = _FIRST_BATCH
        # Events and seconds of the claim in hand, so far.
        self._done, self._spent = 0, 0.0
        self._finished = 0.0
        self._written: deque[tuple[float, int]] = deque()

    def drain(self, on_first_claim: Callable[[bool], None], on_batch: Callable[[], object]) -> int:
        """Claim, encode and write until nothing more is due. Returns how many were claimed.

        `on_first_claim` is told whether the first claim was full, `on_batch` called after each.
        Raises ModelFault, with every claim given back, if the model can't run, and EncodeHung.
        """
        claimed = 0
        batches: deque[Batch] = deque()
        more, ahead = True, _AHEAD
        try:
            while True:
                while more and len(batches) < ahead and not self._stop.is_set():
                    claim = self._queue.claim(self._claim_events)
                    if claim is None:
                        break
                    if claimed == 0:
                        on_first_claim(claim.is_full)
                    claimed += len(claim.event_ids)
                    more = claim.is_full or claim.retried
                    # One that kills the process shall not cost another an attempt.
                    ahead = 1 if claim.retried else _AHEAD
                    batches.extend(self._submit(claim))
                if not batches:
                    return claimed
                self._await_first(batches)
                self._finish(batches.popleft())
                on_batch()
        except ModelFault:
            for batch in batches:
                batch.encoding.cancel()
            self.give_back()
            self._queue.notify()
            raise

    def give_back(self) -> None:
        """Release all that is in hand, from this session or from one before."""
        for lease, event_ids in list(self._in_hand.items()):
            self._queue.release(lease, event_ids)
            # Only now: if the connection breaks meanwhile, it is still in hand.
            del self._in_hand[lease]

    def _submit(self, claim: Claim) -> list[Batch]:
        """At least one batch, in the order of length: what is padded alike is encoded together."""
        self._in_hand[claim.lease] = claim.event_ids
        events = sorted(self._queue.read(claim), key=lambda event: (len(event.text), event.text))
        size, now = self._batch_events, time.monotonic()
        parts = [events[start : start + size] for start in range(0, len(events), size)] or [events]
        return [
            Batch(
                claim.lease,
                part,
                self._encoder.submit([event.text for event in part]),
                now,
                is_last=part is parts[-1],
            )
            for part in parts
        ]

    def _await_first(self, batches: deque[Batch]) -> None:
        """Wait for the first batch's vectors; extend leases, and on a stop give the rest back."""
        extended = time.monotonic()
        while not wait([batches[0].encoding], timeout=_LOOK_UP_SECONDS).done:
            # A long encode is no hang; one that takes too long is ended below.
            health.progressed()
            if self._stop.is_set():
                self._give_back_unstarted(batches)
            if self._seconds_in_hand(batches[0]) > self._settings.encode_seconds:
                self._give_back_unstarted(batches)
                raise EncodeHung(
                    f"the model has not returned for {self._settings.encode_seconds:.0f} s with "
                    f"{len(batches[0].events)} events, the first {batches[0].event_ids[0]}; "
                    "the process ends, to be started again"
                )
            if time.monotonic() - extended > self._settings.lease_seconds / 3:
                extended = time.monotonic()
                for batch in batches:
                    self._queue.extend(batch.lease, batch.event_ids)

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
                batch.lease,
                [event for event, _ in good],
                [vector for _, vector in good],
                self._encoder.fingerprint,
            )
        )
        failed = self._fail(batch, encoded)
        seconds = self._seconds_in_hand(batch)
        self._finished = time.monotonic()
        self._done, self._spent = self._done + len(batch.events), self._spent + seconds
        if batch.is_last:
            self._end_claim(batch.lease)
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
        self._adapt(self._done / max(self._spent, 1e-3))
        self._done, self._spent = 0, 0.0

    def _seconds_in_hand(self, batch: Batch) -> float:
        """How long so far; its predecessor's encode is not its own time."""
        return time.monotonic() - max(batch.submitted, self._finished)

    def _fail(self, batch: Batch, encoded: Encoded) -> int:
        return sum(
            self._queue.fail(batch.lease, [event.event_id], str(result))
            for event, result in zip(batch.events, encoded.results, strict=True)
            if isinstance(result, EmbeddingError)
        )

    def _give_back_unstarted(self, batches: deque[Batch]) -> None:
        """Release the batches, but the first, whose encode hasn't begun."""
        for batch in list(batches)[1:]:
            if batch.encoding.cancel():
                self._queue.release(batch.lease, batch.event_ids)
                batches.remove(batch)
                self._queue.notify()

    def _adapt(self, events_per_second: float) -> None:
        """Size the next claim and its batches by how long they will take."""
        wanted = min(int(events_per_second * _CLAIM_SECONDS), self._claim_events * 2)
        self._claim_events = min(max(wanted, _SMALLEST_CLAIM), self._settings.batch_events)
        self._batch_events = max(int(events_per_second * _BATCH_SECONDS), _SMALLEST_BATCH)
