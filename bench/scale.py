"""What grows with the table: start, status, sweep and claim on tables of very different sizes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench import systems
from bench.big_table import OPTIONS, load
from bench.cluster import Cluster, running_cluster
from bench.models import static
from bench.processes import clean_environment
from bench.progress import BenchError, say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_most
from listener.config import Settings
from listener.database import Connection, connect
from listener.embedder import load_embedder
from listener.queue import Queue

SIZES = (10_000, 1_000_000, 10_000_000)

_LACKING = 1_000
_LAST_N = 10_000
_SWEEP_PAGE = 500
_CLAIM_EVENTS = 64
_TIMES, _CLAIMS = 5, 100
_TARGET = 1.5
_PATIENCE_SECONDS = 120.0

_FORGET = """
delete from public.event_embeddings
where event_id > (select max(e.id) - %s from public.iot_events e)
"""


@dataclass(frozen=True)
class Costs:
    """Milliseconds."""

    start_to_first_vector: float
    listening_to_first_vector: float
    status_command: float
    sweep_of_last_n: float
    claim: float


_NAMES = {
    "start_to_first_vector": "process start to first vector",
    "listening_to_first_vector": "LISTEN live to first vector",
    "status_command": "`listener status`, the process",
    "sweep_of_last_n": f"sweep of the last {_LAST_N} that finds nothing new",
    "claim": f"claim of {_CLAIM_EVENTS}",
}


def run(sizes: Sequence[int]) -> Section:
    """On a server of its own, one table at a time, so that the disk holds the largest once."""
    costs: dict[int, Costs] = {}
    with running_cluster(*OPTIONS) as cluster:
        model = static(cluster.folder)
        for events in sizes:
            costs[events] = _measure(cluster, model, events)
            say(f"scale: {events} events: {costs[events]}")
    return _section(costs)


def _measure(cluster: Cluster, model: Path, events: int) -> Costs:
    settings = systems.listener().settings(model)
    fingerprint = load_embedder(settings).fingerprint
    with cluster.database("scale") as url:
        load(url, fingerprint, events, _LACKING)
        wait_for_quiet()
        with connect(Settings(database_url=url), "bench") as conn:
            queue = Queue(conn, Settings(), None)
            # The first one queues the newest, which the claims then take and give back.
            _sweep(queue, fingerprint)
            sweep = _milliseconds(lambda: _sweep(queue, fingerprint), _TIMES)
            claim = _claim_milliseconds(queue)
            status = _milliseconds(lambda: _status(cluster, url, model), _TIMES)
            started, listening = _start(cluster, url, model, conn)
    return Costs(started, listening, status, sweep, claim)


def _sweep(queue: Queue, fingerprint: str) -> None:
    position, left = None, _LAST_N
    while left > 0:
        page = queue.sweep(fingerprint, position, min(_SWEEP_PAGE, left))
        position, left = page.next_from, left - page.scanned
        if position is None:
            return


def _claim_milliseconds(queue: Queue) -> float:
    taken = []
    for _ in range(_CLAIMS):
        began = time.perf_counter()
        claim = queue.claim(_CLAIM_EVENTS)
        taken.append((time.perf_counter() - began) * 1000)
        if claim is None:
            raise BenchError("nothing to claim where a thousand events wait")
        queue.release(claim.lease, claim.event_ids)
    return median(taken)


def _status(cluster: Cluster, url: str, model: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "listener", "status", "--json"],
        cwd=cluster.folder,
        env={**clean_environment(), "DATABASE_URL": url, "EMBEDDING_MODEL": str(model)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def _start(cluster: Cluster, url: str, model: Path, conn: Connection) -> tuple[float, float]:
    """Medians over starts: from the process's start, and from LISTEN live."""
    starts, listens = [], []
    for number in range(_TIMES):
        _forget_newest(conn)
        wait_for_quiet()
        began = time.time()
        with systems.listener().worker(cluster, url, model) as process:
            first = process.wait_for_stored(1, _PATIENCE_SECONDS)[0].seconds
            listens.append((first - process.wait_for("listening").seconds) * 1000)
            starts.append((first - began) * 1000)
        say(f"scale: start {number + 1} of {_TIMES}: {starts[-1]:.0f} ms")
    return median(starts), median(listens)


def _forget_newest(conn: Connection) -> None:
    """As the load left it; a service that ran has embedded some."""
    conn.execute("truncate listener.queue, listener.change")
    conn.execute(_FORGET, (_LACKING,))


def _milliseconds(call: Callable[[], None], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1000)
    return median(taken)


def _section(costs: dict[int, Costs]) -> Section:
    smallest = min(costs)
    rows = []
    for field, name in _NAMES.items():
        values = {events: asdict(cost)[field] for events, cost in costs.items()}
        ratio = max(values.values()) / values[smallest]
        figures = (f"{values[n]:.1f} ({values[n] / values[smallest]:.2f})" for n in costs)
        rows.append((name, *figures, at_most(ratio, _TARGET)))
    return Section(
        "Scale",
        f"Every event has a current vector but the newest {_LACKING}; model of next to no cost; "
        "tables vacuumed. Milliseconds, medians, and in brackets the ratio to the smallest table; "
        f"the target is for the greatest ratio. The sweep looks at the last {_LAST_N}, page by "
        "page, after a first one has queued what lacks a vector. To load fast, the server runs "
        "with wal_level minimal; the tables are ordinary ones.",
        ("", *(f"{events} events" for events in costs), "target"),
        tuple(rows),
    )
