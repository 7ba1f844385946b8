"""What a worker costs that has nothing to do: start, memory, processor time, queries, log."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import systems
from bench.cluster import Cluster
from bench.models import Model
from bench.processes import LoggedProcess
from bench.progress import say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_most
from bench.systems import System
from listener.config import Settings
from listener.database import connect

_STARTS = 5
# It has worked by then, and what a start leaves to do is done.
_SETTLE_SECONDS = 20.0
_PATIENCE_SECONDS = 120.0
_HOUR = 3600
_TARGET_READY_SECONDS, _TARGET_MEBIBYTES, _TARGET_CPU, _TARGET_QUERIES = 2.0, 450.0, 0.005, 2.0

# Each statement of a worker is a transaction of its own.
_TRANSACTIONS = """
select d.xact_commit + d.xact_rollback
from pg_catalog.pg_stat_database d
where d.datname = current_database()
"""
_INSERT = """
insert into public.iot_events (device_id, event_type, severity, message)
select 'pump-1', 'status', 'info', 'reading ' || g from generate_series(1, 500) g
"""


@dataclass(frozen=True)
class Footprint:
    """Seconds to READY of each start, resident MiB.

    And at rest, in a second: processor seconds, queries, log lines.
    """

    ready: tuple[float, ...]
    mebibytes: float
    cpu: float
    queries: float
    lines: float


def run(cluster: Cluster, model: Model, idle: float, engine: str) -> Section:
    """`idle`: seconds to watch a worker at rest."""
    say(f"footprint: {engine}")
    system = systems.listener(engine)
    systems.prepare(system, model.directory)
    with cluster.database("footprint") as url:
        system.install(url)
        ready = tuple(_start(cluster, system, url, model) for _ in range(_STARTS))
        with system.worker(cluster, url, model.directory) as process:
            with connect(Settings(database_url=url), "bench") as conn:
                conn.execute(_INSERT)
            process.wait_for_stored(500, _PATIENCE_SECONDS)
            time.sleep(_SETTLE_SECONDS)
            found = _watch(process, url, ready, idle)
    return _section(model, engine, found, idle)


def _start(cluster: Cluster, system: System, url: str, model: Model) -> float:
    wait_for_quiet()
    began = time.time()
    with system.worker(cluster, url, model.directory) as process:
        return process.wait_for("listening").seconds - began


def _watch(process: LoggedProcess, url: str, ready: tuple[float, ...], idle: float) -> Footprint:
    pid = process.process.pid
    with connect(Settings(database_url=url), "bench") as conn:

        def transactions() -> int:
            row = conn.execute(_TRANSACTIONS).fetchone()
            assert row is not None
            return int(row[0])

        cpu, queries, began = _cpu_seconds(pid), transactions(), time.monotonic()
        lines = len(process.lines())
        time.sleep(idle)
        seconds = time.monotonic() - began
        return Footprint(
            ready,
            _resident(pid),
            (_cpu_seconds(pid) - cpu) / seconds,
            (transactions() - queries) / seconds,
            (len(process.lines()) - lines) / seconds,
        )


def _cpu_seconds(pid: int) -> float:
    """User and system time of all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kilobytes) / 1024


def _section(model: Model, engine: str, found: Footprint, idle: float) -> Section:
    ready, memory = median(found.ready), found.mebibytes
    return Section(
        f"Footprint, engine {engine}, model {model.name}",
        f"From the start of the process to `listening` in its log, median of {_STARTS} starts with "
        f"files in the cache of the system; then, after 500 events and {_SETTLE_SECONDS:.0f} s of "
        f"rest, resident memory, and for {idle:.0f} s its processor time, the transactions that "
        "the server counts in its database, and the lines of its log.",
        ("figure", "value", "target"),
        (
            ("seconds to READY", f"{ready:.2f}", at_most(ready, _TARGET_READY_SECONDS)),
            ("resident, MiB", f"{memory:.0f}", at_most(memory, _TARGET_MEBIBYTES)),
            ("at rest, share of a core", f"{found.cpu:.2%}", at_most(found.cpu, _TARGET_CPU)),
            ("at rest, queries/s", f"{found.queries:.2f}", at_most(found.queries, _TARGET_QUERIES)),
            ("at rest, processor seconds an hour", f"{found.cpu * _HOUR:.1f}", ""),
            ("at rest, queries an hour", f"{found.queries * _HOUR:.0f}", ""),
            ("at rest, log lines an hour", f"{found.lines * _HOUR:.0f}", ""),
        ),
        ("the targets of READY and memory are those of the fast engine",),
    )
