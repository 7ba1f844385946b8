"""Strikes with a fault every few seconds and measures how long the events of that moment wait."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from traceback import format_exception

from tests.soak import database_faults, faults
from tests.soak.background import Background
from tests.soak.recovery import (
    Recoveries,
    Recovery,
    insert_burst,
    seconds_to_recover,
)
from tests.soak.scene import Fault, Scene

NO_FAULT = "none, for comparison"
FAULTS = (
    Fault(NO_FAULT, faults.nothing),
    Fault("SIGKILL of one worker", faults.kill_one, 5, kills=True),
    Fault("SIGKILL of all workers", faults.kill_all, 1, kills=True),
    Fault("SIGTERM of one worker", faults.end_one, 1, kills=True),
    Fault("SIGSTOP past the lease, SIGCONT", faults.stop_past_lease, 2, lasting=True),
    Fault("wake backend terminated", faults.terminate_wake, 3),
    Fault("work backend terminated", faults.terminate_work, 3),
    Fault("both backends of a worker terminated", faults.terminate_pair, 2),
    Fault("all backends of all workers terminated", faults.terminate_every, 2),
    Fault("statements cancelled", faults.cancel_statements),
    Fault("a writer's backend terminated", faults.terminate_writer),
    Fault("server crash and restart", database_faults.crash_server, 4),
    Fault("server fast restart", database_faults.restart_server),
    Fault("link reset", faults.reset_proxy, 3),
    Fault("link a black hole", faults.black_hole, 2, lasting=True),
    Fault("link with 200 ms of latency", faults.latency, 2, lasting=True),
    Fault("a reply lost", faults.lose_a_reply, 3),
    Fault("queue locked for 2 s", database_faults.lock_queue),
    Fault("queue locked for 9 s", database_faults.lock_queue_for_long, 1),
    Fault("embeddings locked for 2 s", database_faults.lock_embeddings),
    Fault("events locked for 1 s", database_faults.lock_events),
    Fault("a transaction held open", database_faults.hold_transaction, 1, lasting=True),
    Fault("leases expired by hand", database_faults.expire_leases, 3),
    Fault("connections exhausted", database_faults.exhaust_connections),
    Fault("texts that raise", database_faults.poison),
    Fault("changes behind the triggers", database_faults.change_unseen),
)

# From a burst to the strike: somewhere between claim and write, with luck.
_AIM_SECONDS = 0.06
_PEER_SECONDS = 12.0
_LEAST_PAUSE_SECONDS = 0.5


class Chaos(Background):
    """One fault at a time, but for those that last; each kind once before any comes twice."""

    def __init__(
        self, scene: Scene, every: tuple[float, float], faults: tuple[Fault, ...] = FAULTS
    ) -> None:
        super().__init__("chaos")
        self._scene = scene
        self._every = every
        self.counts: Counter[str] = Counter()
        self.recoveries = Recoveries()
        self._pool = ThreadPoolExecutor(2, "lasting")
        self._lasting: Future[None] | None = None
        self._faults = faults
        self._due = list(faults)

    def step(self) -> None:
        """Strike once, wait until it is recovered from, pause."""
        began = time.monotonic()
        fault = self._next()
        self._scene.workers.wait_ready(2 if fault.kills else 1, _PEER_SECONDS)
        ids = insert_burst(self._scene.ground)
        time.sleep(self._scene.chance.uniform(0, _AIM_SECONDS))
        self.counts[fault.kind] += 1
        if fault.lasting:
            if self._lasting is not None:
                self._lasting.result()
            self._lasting = self._pool.submit(self._last, fault, ids)
        else:
            alone = not self._is_lasting()
            self._measure(fault, ids, fault.strike(self._scene), alone)
        pause = self._scene.chance.uniform(*self._every)
        self.stopped.wait(max(pause - (time.monotonic() - began), _LEAST_PAUSE_SECONDS))

    def end(self, seconds: float = 120.0) -> None:
        """Strike no more, and mend what lasts."""
        super().end(seconds)
        if self._lasting is not None and (error := self._lasting.exception()) is not None:
            self.failure = self.failure or "".join(format_exception(error))
        self._scene.proxy.heal()

    def _is_lasting(self) -> bool:
        return self._lasting is not None and not self._lasting.done()

    def _next(self) -> Fault:
        # One that lasts at a time, or no worker might be left.
        busy = self._is_lasting()
        due = [fault for fault in self._due if not (busy and fault.lasting)]
        usable = due or [fault for fault in self._faults if not (busy and fault.lasting)]
        fault = self._scene.chance.choices(usable, [fault.weight for fault in usable])[0]
        if fault in self._due:
            self._due.remove(fault)
        return fault

    def _last(self, fault: Fault, ids: list[int]) -> None:
        """Its events need not wait until it is over."""
        struck, began = self.counts.total(), time.monotonic()
        breaker = self._pool.submit(fault.strike, self._scene)
        self._measure(fault, ids, began, lambda: self.counts.total() == struck)
        breaker.result()

    def _measure(
        self, fault: Fault, ids: list[int], since: float, alone: bool | Callable[[], bool]
    ) -> None:
        seconds = seconds_to_recover(self._scene.ground, ids, since)
        is_alone = alone if isinstance(alone, bool) else alone()
        self.recoveries.add(Recovery(fault.kind, seconds, is_alone))
