"""How vectors get into the table: the fenced write beside other ways to store the same rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median

import numpy as np

from bench import systems
from bench.cluster import Cluster
from bench.progress import BenchError, say
from bench.quiet import wait_for_quiet
from bench.report import Section
from bench.write_ways import FENCED, WAYS, Row, prepare_ways
from listener import queries, template
from listener.claim import Claim
from listener.config import DIMENSION, Settings
from listener.database import Connection, connect
from listener.queue import Queue

SIZES = (1, 32, 256, 2_048)

_MODEL = "bench/none"
_INSERT = """
insert into public.iot_events (device_id, event_type, severity, message)
select 'pump-1', 'status', 'info', 'reading ' || n
from generate_series(1, %s) n
returning id, sha256(convert_to(message, 'UTF8'))
"""
_FILL = """
insert into public.event_embeddings (event_id, embedding, model, content_hash)
select e.id, d.embedding, 'bench/none', sha256(convert_to(e.message, 'UTF8'))
from unnest(%b) with ordinality as d (embedding, place)
join public.iot_events e on e.id = d.place
"""
_INDEX = """
create index event_embeddings_hnsw_idx
on public.event_embeddings using hnsw (embedding public.vector_cosine_ops)
"""
# About as many rows for each size, within bounds that keep both ends bearable.
_ROWS, _MOST_TIMES, _FEWEST_TIMES = 4_096, 200, 3

Milliseconds = dict[tuple[bool, int, str], float]


def run(cluster: Cluster, sizes: Sequence[int], filled: int) -> Section:
    """Without an index on the vectors, then with one; `filled` vectors are there before."""
    taken: Milliseconds = {}
    for indexed in (False, True):
        with ExitStack() as stack:
            fenced = stack.enter_context(_database(cluster, "writes_fenced", filled, indexed))
            bare = stack.enter_context(_database(cluster, "writes_bare", filled, indexed))
            # Takes triggers and queue out; event_embeddings stays.
            bare.execute(template.sql_text("900_uninstall.sql").encode())
            prepare_ways(bare)
            for size in sizes:
                for way, value in _measure(fenced, bare, size).items():
                    taken[indexed, size, way] = value
                say(f"writes: {size} rows, {'HNSW index' if indexed else 'no index'}")
    return _section(taken, filled)


@contextmanager
def _database(cluster: Cluster, name: str, filled: int, indexed: bool) -> Iterator[Connection]:
    with cluster.database(name) as url:
        with connect(Settings(database_url=url), "bench") as conn:
            if filled:
                conn.execute(_INSERT, (filled,))
        systems.listener().install(url)
        with connect(Settings(database_url=url), "bench") as conn:
            conn.execute(queries.SERVICE_SESSION)
            # As the service does, what is executed again and again is prepared.
            conn.prepare_threshold = 5
            # An index over thousands of vectors takes longer than a statement of the service may.
            conn.execute("set statement_timeout = 0")
            if filled:
                conn.execute(_FILL, (_vectors(filled),))
            if indexed:
                conn.execute(_INDEX)
            yield conn


def _measure(fenced: Connection, bare: Connection, size: int) -> dict[str, float]:
    """The ways in turn, so that a drift of the machine and a growing table meet all alike."""
    queue = Queue(fenced, Settings(), None)
    times = min(max(_ROWS // size, _FEWEST_TIMES), _MOST_TIMES)
    taken: dict[str, list[float]] = {FENCED: [], **{way: [] for way in WAYS}}
    wait_for_quiet()
    for _ in range(times):
        taken[FENCED].append(_fenced(queue, fenced, size))
        for way, store in WAYS.items():
            taken[way].append(_bare(bare, store, size))
    return {way: median(values) for way, values in taken.items()}


def _fenced(queue: Queue, conn: Connection, size: int) -> float:
    conn.execute(_INSERT, (size,))
    claim: Claim | None = queue.claim(size)
    if claim is None or len(claim.event_ids) != size:
        raise BenchError(f"of {size} events that wait, the claim brought {claim}")
    events, vectors = queue.read(claim), _vectors(size)
    began = time.perf_counter()
    stored = queue.write(claim.lease, events, vectors, _MODEL)
    milliseconds = (time.perf_counter() - began) * 1000
    if len(stored) != size:
        raise BenchError(f"of {size} vectors {len(stored)} were stored")
    return milliseconds


def _bare(conn: Connection, store: Callable[[Connection, Sequence[Row]], None], size: int) -> float:
    inserted = conn.execute(_INSERT, (size,)).fetchall()
    rows = [
        (event_id, vector, _MODEL, content_hash)
        for (event_id, content_hash), vector in zip(inserted, _vectors(size), strict=True)
    ]
    began = time.perf_counter()
    store(conn, rows)
    return (time.perf_counter() - began) * 1000


def _vectors(count: int) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Never the same twice: equal vectors would be no work for the index."""
    drawn = _CHANCE.standard_normal((count, DIMENSION)).astype(np.float32)
    return list(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


_CHANCE = np.random.default_rng(8)


def _section(taken: Milliseconds, filled: int) -> Section:
    rows = []
    for indexed, size in dict.fromkeys((indexed, size) for indexed, size, _ in taken):
        fenced = taken[indexed, size, FENCED]
        values = (taken[indexed, size, way] for way in WAYS)
        rows.append(
            (
                f"{size}, {'HNSW index' if indexed else 'no index'}",
                f"{fenced:.2f}",
                f"{fenced / size * 1000:.0f}",
                *(f"{value:.2f} ({value / fenced:.2f})" for value in values),
            )
        )
    return Section(
        "Writing",
        f"Milliseconds to store so many new rows in event_embeddings, {filled} being there "
        "before; medians; in brackets the ratio to the fenced write. The fenced write is the "
        "service's own: it also checks lease, version and text of each event and takes it out of "
        "the queue, which the others don't. No commit waits for the disk.",
        ("rows", FENCED, "µs a row", *WAYS),
        tuple(rows),
    )
