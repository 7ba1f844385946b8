"""One soak: build it up, let it run, mend everything, let it drain, look, take it down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import psycopg

from bench.machine import describe_machine
from bench.progress import say
from tests.proxy import proxied
from tests.soak.background import Background
from tests.soak.chaos import FAULTS, Chaos
from tests.soak.checker import Checker
from tests.soak.faults import LEASE_SECONDS
from tests.soak.ground import Ground, dice, prepared_ground
from tests.soak.scene import Fault, Scene
from tests.soak.watcher import Watcher
from tests.soak.workers import Settings, Workers
from tests.soak.writers import Tally, Writer, start_writers

_DRAIN_SECONDS = 120.0
_PROGRESS_SECONDS = 15.0

_DUE = b"select count(*) from listener.waiting"
_TOTALS = b"""
select
  (select count(*) from public.iot_events),
  (select count(*) from public.event_embeddings),
  (select count(*) from soak.embedded),
  (select count(*) from soak.text)
"""
_PARKED = b"""
select q.error, count(*) from listener.queue q
where q.due_at = 'infinity' group by q.error order by count(*) desc limit 10
"""


@dataclass(frozen=True)
class Plan:
    """What to do, and for how long. `rate`: changes a second; `every`: seconds between faults."""

    minutes: float
    seed: int
    rate: float = 100.0
    every: tuple[float, float] = (3.0, 7.0)
    faults: tuple[Fault, ...] = FAULTS


@dataclass
class Soak:
    """Everything that took part, and what was found at the end."""

    plan: Plan
    ground: Ground
    workers: Workers
    checker: Checker
    watcher: Watcher
    chaos: Chaos
    tally: Tally = field(default_factory=Tally)
    writers: list[Writer] = field(default_factory=list)
    machine: str = ""
    seconds: float = 0.0
    drain_seconds: float | None = None
    is_cut_short: bool = False
    codes: dict[str, int | None] = field(default_factory=dict)
    totals: tuple[int, ...] = (0, 0, 0, 0)
    parked: list[tuple[str, int]] = field(default_factory=list)

    def threads(self) -> list[Background]:
        """All of the harness's own, in the order in which they are to end."""
        return [self.chaos, *self.writers, self.checker, self.watcher, self.workers]

    def failures(self) -> list[str]:
        """Errors of the harness itself."""
        return [thread.failure for thread in self.threads() if thread.failure is not None]


@contextmanager
def run_soak(plan: Plan) -> Iterator[Soak]:
    """Soak as planned, or until Ctrl-C. The soak that has ended, its logs still there."""
    with ExitStack() as stack:
        say("starting the server and the workers")
        ground = stack.enter_context(prepared_ground())
        assert ground.cluster.server.port is not None
        proxy = stack.enter_context(proxied(ground.cluster.server.port))
        urls = [ground.url, ground.url, ground.tcp_url(proxy.port)]
        settings = Settings(lease_seconds=LEASE_SECONDS)
        workers = Workers(ground.cluster.folder, urls, ground.model, settings)
        stack.callback(workers.kill_all)
        scene = Scene(ground, workers, proxy, dice(plan.seed, "chaos"))
        chaos = Chaos(scene, plan.every, plan.faults)
        soak = Soak(plan, ground, workers, Checker(ground), Watcher(ground), chaos)
        stack.callback(_stop_all, soak)
        soak.machine = describe_machine(ground.cluster)
        _run(soak)
        _mend_and_look(soak)
        yield soak


def _run(soak: Soak) -> None:
    soak.workers.start()
    if not soak.workers.wait_ready(len(soak.workers.all)):
        raise SystemExit(f"the workers don't serve:\n{soak.workers.all[0].tail(20)}")
    soak.watcher.start()
    soak.checker.start()
    soak.writers = start_writers(soak.ground, soak.tally, soak.plan.rate, soak.plan.seed)
    soak.chaos.start()
    began = time.monotonic()
    try:
        while time.monotonic() - began < soak.plan.minutes * 60 and not soak.failures():
            time.sleep(min(_PROGRESS_SECONDS, soak.plan.minutes * 60))
            _tell(soak, began)
    except KeyboardInterrupt:
        soak.is_cut_short = True
        say("cut short; mending and draining, then the report")
    soak.seconds = time.monotonic() - began


def _tell(soak: Soak, began: float) -> None:
    counts, left = soak.tally.counts, soak.plan.minutes * 60 - (time.monotonic() - began)
    violations = sum(len(events) for events in soak.checker.findings.events.values())
    say(
        f"{max(left, 0):.0f} s left, {counts['inserted']} inserted, {counts['updated']} updated, "
        f"{counts['deleted']} deleted, {soak.chaos.counts.total()} faults, "
        f"{soak.watcher.pending} pending, {soak.workers.starts} worker starts, "
        f"{len(soak.tally.errors)} writer errors, {violations} violations"
    )


def _mend_and_look(soak: Soak) -> None:
    """No more faults, no more writes; whatever is broken is whole again."""
    soak.chaos.end()
    for writer in soak.writers:
        writer.end()
    soak.checker.end()
    say("draining")
    soak.drain_seconds = _drain(soak)
    soak.watcher.end()
    with soak.ground.connect("soak-last-look") as conn:
        soak.checker.look_at_rest(conn)
        soak.totals = conn.execute(_TOTALS).fetchone() or soak.totals
        soak.parked = [(row[0], row[1]) for row in conn.execute(_PARKED)]
    say("ending the workers")
    soak.codes = soak.workers.leave()


def _drain(soak: Soak) -> float | None:
    """Seconds until nothing was due any more; None if the time was up before."""
    began = time.monotonic()
    while time.monotonic() - began < _DRAIN_SECONDS:
        try:
            # All that was ever changed behind the triggers; it queues nothing else.
            soak.checker.sweep(None)
            with soak.ground.connect("soak-drain") as conn:
                if conn.execute(_DUE).fetchone() == (0,) and not soak.checker.sweep(None)["queued"]:
                    return time.monotonic() - began
        except psycopg.OperationalError:
            pass
        time.sleep(0.5)
    return None


def _stop_all(soak: Soak) -> None:
    for thread in soak.threads():
        thread.end()
