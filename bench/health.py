"""The queue's health: a long backlog, and a snapshot that somebody holds open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import psycopg

from bench import systems
from bench.cluster import Cluster
from bench.drainer import CLAIM_EVENTS, Claims, Drainer, running_drainer
from bench.pgbench import steady_inserts
from bench.progress import say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_most
from listener.config import Settings
from listener.database import connect

_INSERT = """
insert into public.iot_events (device_id, event_type, severity, message)
select 'pump-' || n %% 200, 'status', 'info', 'reading ' || n
from generate_series(1, %s) n
"""
_INSERTED_TOGETHER = 10_000
_PARTS = {"first": (0.0, 0.1), "middle": (0.45, 0.55), "last": (0.9, 1.0)}
_TARGET = 1.5

_DEAD = """
select t.relname, t.n_dead_tup
from pg_catalog.pg_stat_user_tables t
where t.schemaname = 'listener' and t.n_dead_tup > 0
"""
_LOOK_SECONDS = 2.0
_RATE = 500
_WARMING_UP = 20
# Autovacuum looks once a minute.
_BEFORE_SECONDS, _AFTER_SECONDS = 60, 150


@dataclass(frozen=True)
class Phase:
    """What was measured before, while and after the snapshot was held."""

    name: str
    seconds: float
    claims: Claims
    most_dead: Counter[str]
    dead_at_end: Counter[str]


def backlog(cluster: Cluster, events: int) -> Section:
    """Claims while a long queue is drained from its beginning to its end."""
    with cluster.database("backlog") as url:
        systems.listener().install(url)
        with connect(Settings(database_url=url), "bench") as conn:
            for start in range(0, events, _INSERTED_TOGETHER):
                conn.execute(_INSERT, (min(_INSERTED_TOGETHER, events - start),))
        say(f"health: {events} events wait")
        wait_for_quiet()
        with running_drainer(url) as drainer:
            claims = drainer.drain()
    # Of a session's first claims each is planned anew.
    del claims.milliseconds[:_WARMING_UP]
    first = claims.quantile(99, *_PARTS["first"])
    rows = []
    for name, part in _PARTS.items():
        p99 = claims.quantile(99, *part)
        target = "" if name == "first" else at_most(p99 / first, _TARGET)
        cells = (f"{claims.quantile(50, *part):.2f}", f"{p99:.2f}", f"{p99 / first:.2f}", target)
        rows.append((f"{name} tenth", *cells))
    return Section(
        "A long backlog",
        f"{claims.events} events wait when the drain begins; {len(claims.milliseconds)} claims of "
        f"{CLAIM_EVENTS} after the first {_WARMING_UP}, each read and written with a vector that "
        "costs nothing. Milliseconds of a claim.",
        ("claims", "p50", "p99", "p99 of the first tenth's", "target"),
        tuple(rows),
    )


def held_snapshot(cluster: Cluster, seconds: int) -> Section:
    """Claims and dead tuples under a steady load, while a transaction keeps its snapshot."""
    before, after = min(_BEFORE_SECONDS, seconds), min(_AFTER_SECONDS, seconds)
    with cluster.database("held") as url:
        systems.listener().install(url)
        wait_for_quiet()
        with (
            steady_inserts(cluster, "held", _RATE, before + seconds + after + 10),
            running_drainer(url) as drainer,
        ):
            phases = [_phase("before", url, drainer, before)]
            with _snapshot(url):
                phases.append(_phase("held", url, drainer, seconds))
            phases.append(_phase("after", url, drainer, after))
    return _section(phases)


@contextmanager
def _snapshot(url: str) -> Iterator[None]:
    with psycopg.connect(url) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.execute("select count(*) from public.iot_events")
        yield


def _phase(name: str, url: str, drainer: Drainer, seconds: float) -> Phase:
    say(f"health: snapshot: {name}, {seconds:.0f} s")
    most: Counter[str] = Counter()
    last: Counter[str] = Counter()
    done = Event()

    def watch() -> None:
        with connect(Settings(database_url=url), "bench-watch") as conn:
            while not done.wait(_LOOK_SECONDS):
                last.clear()
                last.update(dict(conn.execute(_DEAD).fetchall()))
                most.update({table: max(n - most[table], 0) for table, n in last.items()})

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            claims = drainer.drain_for(seconds)
        finally:
            done.set()
        watching.result()
    return Phase(name, seconds, claims, most, last)


def _section(phases: list[Phase]) -> Section:
    before, held, after = phases
    rows = [
        (
            phase.name,
            f"{phase.seconds:.0f}",
            str(phase.claims.events),
            f"{phase.claims.quantile(50):.2f}",
            f"{phase.claims.quantile(99):.2f}",
            _verdict(phase, before),
            _tables(phase.most_dead),
            _tables(phase.dead_at_end),
        )
        for phase in phases
    ]
    growth = held.claims.quantile(99, 0.8, 1.0) / held.claims.quantile(99, 0.0, 0.2)
    dead = sum(held.most_dead.values()) / max(held.claims.events, 1)
    left = sum(after.dead_at_end.values())
    return Section(
        "A held snapshot",
        f"{_RATE} single-row inserts a second, embedded at once with a vector that costs nothing. "
        "In the middle another session holds a repeatable-read snapshot, so that vacuum can remove "
        "no dead tuple. Milliseconds of a claim, those that find nothing included; dead tuples of "
        "all tables in schema listener, as the server's statistics have them.",
        ("snapshot", "s", "events", "p50", "p99", "target", "most dead tuples", "at its end"),
        tuple(rows),
        (
            f"p99 of the last fifth of the hold is {growth:.2f} times the first fifth's",
            f"while held, {dead:.1f} dead tuples for each event at most; {left} are left at the "
            "very end",
        ),
    )


def _verdict(phase: Phase, before: Phase) -> str:
    if phase is before:
        return ""
    ratio = phase.claims.quantile(99) / before.claims.quantile(99)
    return f"{ratio:.2f} of before, {at_most(ratio, _TARGET)}"


def _tables(counts: Counter[str]) -> str:
    return ", ".join(f"{table} {count}" for table, count in sorted(counts.items())) or "0"
