"""From SIGKILL of a worker with claims in hand to the vectors of the events that it held."""

from __future__ import annotations

import signal
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any

from bench.machine import describe_machine
from bench.progress import BenchError, say
from bench.report import Section, at_most
from bench.texts import copy_messages, random_texts
from listener.worker import LOCK_CLASS
from tests.soak.ground import Connection, Ground, prepared_ground
from tests.soak.workers import Settings, Workers

_TARGET_P50, _TARGET_MAX = 2.0, 5.0
# Texts long enough that a batch takes the tokenizer a while, time to strike; and few, so that what
# the victim held does not wait behind the rest.
_EVENTS, _TEXTS_IN_ONE = 128, 12
_PATIENCE_SECONDS = 90.0
_TRIES = 3

# A claim that holds, its worker's process, and the backend that the process has for its work.
_IN_HAND = b"""
select w.worker, w.pid, l.pid
from listener.queue q
join listener.worker w on w.worker = q.worker
join pg_locks l
  on l.locktype = 'advisory' and l.granted and l.mode = 'ExclusiveLock'
  and l.classid = %(lock_class)s and l.objid = w.worker
where q.lease is not null and q.due_at > now() and q.due_at < 'infinity'
limit 1
"""
_HELD = b"select array_agg(q.event_id) from listener.queue q where q.worker = %(worker)s"
_GONE = b"""
select clock_timestamp() from (select) one
where not exists (select from pg_stat_activity a where a.pid = %(backend)s)
"""
# Not those that the victim's last statement stored, which its backend finished without it.
_VECTORS = b"""
select
  count(*) filter (where m.event_id is null) as missing,
  array_agg(extract(epoch from m.embedded_at - %(killed)s)::float8)
    filter (where m.embedded_at > %(gone)s) as seconds
from unnest(%(held)s::bigint[]) as h (event_id)
left join public.event_embeddings m on m.event_id = h.event_id
"""
_NOW = b"select clock_timestamp()"
_REST = b"select count(*) from listener.waiting"


@dataclass(frozen=True)
class Kill:
    """Seconds from the kill to the vector, of each event that the victim held."""

    seconds: list[float]


def run(kills: int) -> tuple[str, Section]:
    """Two workers, one of them killed, again and again. The machine, and what came out."""
    with prepared_ground() as ground:
        urls = [ground.url, ground.url]
        workers = Workers(ground.cluster.folder, urls, ground.model, Settings(60.0, 60.0))
        workers.start()
        try:
            measured = [_measured(ground, workers, number, kills) for number in range(kills)]
            return describe_machine(ground.cluster), _section(measured)
        finally:
            workers.kill_all()


def _measured(ground: Ground, workers: Workers, number: int, kills: int) -> Kill:
    for attempt in range(_TRIES):
        kill = _kill(ground, workers, seed=number * _TRIES + attempt)
        if kill is not None:
            longest = max(kill.seconds)
            say(f"kill {number + 1} of {kills}: {len(kill.seconds)} held, last {longest:.2f} s")
            return kill
    raise BenchError(f"no worker was caught with events in hand in {_TRIES} tries")


def _kill(ground: Ground, workers: Workers, seed: int) -> Kill | None:
    """None if the victim had stored all that it held before it died."""
    if not workers.wait_ready(2):
        raise BenchError(f"two workers don't serve:\n{workers.all[0].tail(20)}")
    with closing(ground.connect("soak-kills")) as conn:
        # The restart's own work is over; both sleep.
        _until(conn, _REST, (0,))
        time.sleep(1)
        copy_messages(ground.url, _long_texts(seed))
        worker, pid, backend = _await(conn, _IN_HAND, lock_class=LOCK_CLASS)
        victim = next(one for one in workers.all if one.process.pid == pid)
        workers.send(victim, signal.SIGKILL)
        (killed,) = _await(conn, _NOW)
        (held,) = _await(conn, _HELD, worker=worker)
        (gone,) = _await(conn, _GONE, backend=backend)
        seconds = _seconds(conn, held or [], killed, gone)
        _until(conn, _REST, (0,))
    return Kill(seconds) if seconds else None


def _long_texts(seed: int) -> list[str]:
    words = random_texts(_TEXTS_IN_ONE * _EVENTS, seed)
    return [
        " ".join(words[start : start + _TEXTS_IN_ONE])
        for start in range(0, len(words), _TEXTS_IN_ONE)
    ]


def _seconds(
    conn: Connection, held: list[int], killed: datetime, gone: datetime
) -> list[float] | None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        missing, seconds = _await(conn, _VECTORS, held=held, killed=killed, gone=gone)
        if missing == 0:
            return list(seconds or [])
        time.sleep(0.02)
    raise BenchError(f"{missing} events that a killed worker held have no vector")


def _await(conn: Connection, statement: bytes, **parameters: object) -> tuple[Any, ...]:
    """The first row of it as soon as there is one."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        row = conn.execute(statement, parameters).fetchone()
        if row is not None:
            return tuple(row)
    raise BenchError(f"no row within {_PATIENCE_SECONDS:.0f} s: {statement.decode().strip()}")


def _until(conn: Connection, statement: bytes, wanted: tuple[int, ...]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while conn.execute(statement).fetchone() != wanted:
        if time.monotonic() > deadline:
            raise BenchError(f"the queue is not empty after {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.05)


def _section(measured: list[Kill]) -> Section:
    last = [max(kill.seconds) for kill in measured]
    every = [seconds for kill in measured for seconds in kill.seconds]
    rows = [
        (name, str(len(seconds)), f"{median(seconds):.2f}", f"{max(seconds):.2f}", *verdict)
        for name, seconds, verdict in (
            (
                "last event of a kill",
                last,
                (at_most(median(last), _TARGET_P50), at_most(max(last), _TARGET_MAX)),
            ),
            ("every event held", every, ("", "")),
        )
    ]
    return Section(
        "SIGKILL of a worker with events in hand",
        f"Two workers with a model that costs next to nothing and leases and polls of 60 s; "
        f"{_EVENTS} long texts wake them; one is killed as soon as it is seen with a claim, "
        f"{len(measured)} times, and started again at once. From the kill to the vector of each "
        "event that it held and had not stored, written by its peer or by its successor.",
        ("", "count", "p50 s", "max s", "target p50", "target max"),
        tuple(rows),
    )
