"""What kills and restarts cost: vectors a second of a backlog, with and without them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import psycopg

from bench import systems
from bench.machine import describe_machine
from bench.models import minilm
from bench.progress import BenchError, say
from bench.report import Section, at_least
from bench.texts import copy_messages, random_texts
from tests.soak.background import Background
from tests.soak.ground import Ground, prepared_ground
from tests.soak.workers import Settings, Workers

_TARGET = 0.9
_WARM_UP_SECONDS = 5.0
_UNDISTURBED, _KILLED, _CRASHED = "undisturbed", "killed", "crashed"
# More than this machine's cores embed: a run must not come near the end of its backlog.
_MOST_PER_SECOND = 600
_LOOK_SECONDS = 0.1

_COUNT = b"select count(*) from public.event_embeddings"
_QUEUED = b"select count(*) from listener.waiting"


@dataclass(frozen=True)
class Every:
    """Seconds between kills, and between crashes of the server."""

    kill: float
    crash: float


@dataclass(frozen=True)
class Run:
    """One run: what was stored, over how long, and how much of it workers and database served."""

    name: str
    vectors: int
    seconds: float
    up_seconds: float
    ready_seconds: float
    disturbances: int

    @property
    def rate(self) -> float:
        """Vectors a second while the database was up."""
        return self.vectors / self.up_seconds

    @property
    def rate_of_ready(self) -> float:
        """Vectors a second and worker that serves: without what a start of Python takes."""
        return self.vectors / self.ready_seconds


class Disturber(Background):
    """Calls `strike` every so often until stopped, and adds up the seconds it says were lost."""

    def __init__(self, every: float, strike: Callable[[], float]) -> None:
        super().__init__("disturber")
        self._every = every
        self._strike = strike
        self.strikes = 0
        self.down_seconds = 0.0

    def step(self) -> None:
        """Wait, and strike."""
        if not self.stopped.wait(self._every):
            self.down_seconds += self._strike()
            self.strikes += 1


def run(seconds: float, rounds: int, every: Every, engine: str) -> tuple[str, Section]:
    """Rounds of undisturbed, killed and crashed. The machine, and the table."""
    system = systems.listener(engine)
    systems.prepare(system, minilm())
    # Two of torch's teams, each with a thread for every core, would only wait for each other.
    threads = {"OMP_NUM_THREADS": "1"} if engine == systems.TORCH else {}
    with prepared_ground(minilm()) as ground:
        settings = Settings(60.0, 15.0, extra={**system.environment, **threads})
        urls = [ground.url, ground.url]
        workers = Workers(ground.cluster.folder, urls, ground.model, settings)
        workers.start()
        try:
            machine = describe_machine(ground.cluster)
            runs = [_round(ground, workers, seconds, every, one) for one in range(rounds)]
        finally:
            workers.kill_all()
    return machine, _section(runs, seconds, every, engine)


def _round(
    ground: Ground, workers: Workers, seconds: float, every: Every, number: int
) -> list[Run]:
    """In turn, so that what else the machine does falls on all alike."""
    victims = cycle(workers.all)

    def kill() -> float:
        workers.send(next(victims), signal.SIGKILL)
        return 0.0

    def restart() -> float:
        went, back = ground.restart("immediate")
        return back - went

    plan: list[tuple[str, Disturber | None]] = [
        (_UNDISTURBED, None),
        (_KILLED, Disturber(every.kill, kill)),
        (_CRASHED, Disturber(every.crash, restart)),
    ]
    runs = []
    for name, disturber in plan:
        _fill(ground, int(_MOST_PER_SECOND * (seconds + 2 * _WARM_UP_SECONDS)), seed=time.time_ns())
        runs.append(_run(ground, workers, name, seconds, disturber))
        say(f"round {number + 1}, {name}: {runs[-1].rate:.0f} vectors/s")
    return runs


def _fill(ground: Ground, events: int, seed: int) -> None:
    """Bring the backlog to this many."""
    missing = events - _asked(ground, _QUEUED)
    if missing > 0:
        copy_messages(ground.url, random_texts(missing, seed))


def _run(
    ground: Ground, workers: Workers, name: str, seconds: float, disturber: Disturber | None
) -> Run:
    if not workers.wait_ready(len(workers.all)):
        raise BenchError(f"the workers don't serve:\n{workers.all[0].tail(20)}")
    time.sleep(_WARM_UP_SECONDS)
    if disturber is not None:
        disturber.start()
    before, began = _asked(ground, _COUNT), time.monotonic()
    ready_seconds, looked = 0.0, began
    while time.monotonic() - began < seconds:
        time.sleep(_LOOK_SECONDS)
        ready, now = len(workers.ready()), time.monotonic()
        ready_seconds, looked = ready_seconds + ready * (now - looked), now
    if disturber is not None:
        # A restart in hand is finished and counted, so that the database is up for the last count.
        disturber.end()
        if disturber.failure is not None:
            raise BenchError(disturber.failure)
    vectors, took = _asked(ground, _COUNT) - before, time.monotonic() - began
    if _asked(ground, _QUEUED) == 0:
        raise BenchError(f"{name}: the backlog was too short")
    down = disturber.down_seconds if disturber is not None else 0.0
    strikes = disturber.strikes if disturber is not None else 0
    return Run(name, vectors, took, took - down, ready_seconds, strikes)


def _asked(ground: Ground, statement: bytes) -> int:
    deadline = time.monotonic() + 30
    while True:
        try:
            with ground.connect("soak-throughput") as conn:
                row = conn.execute(statement).fetchone()
            assert row is not None
            return int(row[0])
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _section(rounds: list[list[Run]], seconds: float, every: Every, engine: str) -> Section:
    threads = "of one thread each" if engine == systems.TORCH else "that may use all cores each"
    rows = []
    for name in (_UNDISTURBED, _KILLED, _CRASHED):
        pairs = [(_named(runs, _UNDISTURBED), _named(runs, name)) for runs in rounds]
        ratios = [run.rate / base.rate for base, run in pairs]
        ratio = median(ratios)
        rows.append(
            (
                name,
                str(sum(run.disturbances for _, run in pairs)),
                f"{median(run.rate for _, run in pairs):.0f}",
                f"{ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                "" if name == _UNDISTURBED else at_least(ratio, _TARGET),
                f"{sum(run.ready_seconds for _, run in pairs):.0f}",
                f"{median(run.rate_of_ready / base.rate_of_ready for base, run in pairs):.3f}",
            )
        )
    return Section(
        f"Throughput under kills and restarts, engine {engine}",
        f"A backlog of distinct texts of about 20 tokens, all-MiniLM-L6-v2, two workers {threads}. "
        f"{len(rounds)} rounds of {seconds:.0f} s a run. Killed: one of the two in "
        f"turn every {every.kill:g} s, started again at once. Crashed: the server stopped "
        f"immediately every {every.crash:g} s and started again at once. Vectors are counted over "
        "the time that the database is up; a ratio is the median of the rounds' ratios.",
        (
            "run",
            "disturbances",
            "vectors/s while up",
            "ratio (range)",
            "target",
            "worker-seconds of service",
            "ratio per worker-second",
        ),
        tuple(rows),
        (
            "a start of a worker takes processor time, on the cores that the other one computes "
            "on; the ratio per worker-second counts only the time in which workers served",
        ),
    )


def _named(runs: list[Run], name: str) -> Run:
    return next(run for run in runs if run.name == name)
