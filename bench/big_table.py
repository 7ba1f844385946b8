"""Tables of any size with every event embedded but the newest, loaded fast and vacuumed."""

from __future__ import annotations

import time

import numpy as np

from bench.cluster import install_listener
from bench.progress import BenchError, say
from listener import queries
from listener.config import DIMENSION, Settings
from listener.database import Connection, connect
from listener.vectors import register_vector

# Of the server that loads: what is inserted after a truncate in the same transaction needs no WAL.
OPTIONS = ("wal_level=minimal", "max_wal_senders=0", "max_wal_size=4GB", "checkpoint_timeout=15min")

_EVENTS = """
insert into public.iot_events (device_id, event_type, severity, message, created_at)
select
  'pump-' || n %% 200,
  'status',
  'info',
  'bearing temperature above its limit, reading ' || n,
  now() - (%(events)s - n) * interval '1 millisecond'
from generate_series(1, %(events)s) n
"""
# A few dozen vectors by turns. The hash is spelled out, because to call embedding_input for each
# row would take most of the time; that both agree is checked afterwards.
_VECTORS = """
insert into public.event_embeddings (event_id, embedding, model, content_hash, embedded_at)
select
  e.id,
  (%(vectors)b::public.vector[])[1 + e.id %% %(kinds)s],
  %(model)s,
  sha256(convert_to(e.message, 'UTF8')),
  now()
from public.iot_events e
where e.id <= %(embedded)s
"""
_KINDS = 48
_CHECKED = 5_000


def load(url: str, fingerprint: str, events: int, lacking: int) -> None:
    """Fill an empty iot_events, install, embed all but the newest `lacking`, vacuum."""
    began = time.monotonic()
    with connect(Settings(database_url=url), "bench-load") as conn:
        conn.execute("set synchronous_commit = off")
        # Before the install, so that no trigger queues them.
        with conn.transaction():
            conn.execute("truncate public.iot_events")
            conn.execute(_EVENTS, {"events": events})
        install_listener(url, ["message"])
        # The type is new.
        register_vector(conn)
        _embed(conn, fingerprint, events - lacking)
        for table in ("public.iot_events", "public.event_embeddings"):
            conn.execute(f"vacuum (freeze, analyze) {table}".encode())
        conn.execute("checkpoint")
        _check(conn, fingerprint, min(_CHECKED, events), lacking)
    say(f"scale: {events} events loaded in {time.monotonic() - began:.0f} s")


def unit_vectors(count: int) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Random ones, the same each time."""
    drawn = np.random.default_rng(1).standard_normal((count, DIMENSION)).astype(np.float32)
    return list(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def _embed(conn: Connection, fingerprint: str, embedded: int) -> None:
    parameters = {
        "vectors": unit_vectors(_KINDS),
        "kinds": _KINDS,
        "model": fingerprint,
        "embedded": embedded,
    }
    # The foreign key is true by construction; checking it would take as long as the rest.
    conn.execute("set session_replication_role = replica")
    with conn.transaction():
        conn.execute("truncate public.event_embeddings")
        conn.execute(_VECTORS, parameters)
    conn.execute("reset session_replication_role")


def _check(conn: Connection, fingerprint: str, last: int, lacking: int) -> None:
    """By the listener's own function, or its sweep would embed everything again."""
    found = conn.execute(queries.COVERAGE, {"model": fingerprint, "last": last}).fetchone()
    if found != (last, last - lacking):
        raise BenchError(f"of the last {last} events {found} are (there, current)")
