"""Waiting until every event has its vector, at next to no cost to the server."""

from __future__ import annotations

import time
from typing import Any

from bench.processes import LoggedProcess
from listener.database import Connection

# Drawn at random, so that about ln(n) witnesses do for n events.
_WITNESS = """
select e.id
from public.iot_events e
left join public.event_embeddings m on m.event_id = e.id
where m.event_id is null
order by random()
limit 1
"""
_IS_EMBEDDED = "select exists (select from public.event_embeddings where event_id = %s)"
_LOOK_SECONDS = 0.02


def wait_until_all_visible(conn: Connection, process: LoggedProcess, patience: float) -> float:
    """When the last vector was seen, as time.perf_counter() counts.

    Waits for one event that lacks its vector, then for another, until none is left: a look is one
    probe of an index. Raises BenchError if the worker ends or the time is up.
    """
    deadline = time.monotonic() + patience
    while (witness := conn.execute(_WITNESS).fetchone()) is not None:
        while not _is_embedded(conn, witness[0]):
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() > deadline or process.process.poll() is not None:
                process.require_alive(deadline, f"event {witness[0]} had its vector")
    return time.perf_counter()


def _is_embedded(conn: Connection, event_id: Any) -> bool:
    row = conn.execute(_IS_EMBEDDED, (event_id,)).fetchone()
    return bool(row and row[0])
