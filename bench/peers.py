"""The listener beside what a user would take instead, in one table."""

from __future__ import annotations

from collections.abc import Sequence

from bench import peer_drain, peer_latency, systems
from bench.cluster import Cluster
from bench.models import GTE_SHAPE, find_model
from bench.report import Section
from bench.rows import Row, table

CLIENTS = (32, 64)


def run(
    cluster: Cluster,
    texts: int,
    events: int,
    rounds: int,
    inserts: int,
    writers: Sequence[Row],
) -> Section:
    """Drain with a real model's cost and with none, latency, and the writers' rows as given."""
    ours = [systems.listener(engine) for engine in systems.engines()]
    peers = systems.peers()
    model = find_model(GTE_SHAPE, cluster.folder)
    rows = [
        peer_drain.model_row(cluster, model, [*ours, *peers], texts),
        # The engine makes no difference to a static model.
        peer_drain.queue_row(cluster, [systems.listener(), *peers], events, rounds),
        *peer_latency.rows(cluster, model, [*ours, *peers], inserts),
        *writers,
    ]
    return table(
        "Beside its peers",
        "Each cell is the figure and, in brackets, its ratio to the row's baseline, measured in "
        "the same run on the same server. One worker each, with default settings or those that "
        "its documentation advises; each embeds the same column with the same model, and no "
        "worker's commit waits for the disk. A drain runs from the return of one COPY, the worker "
        "idle, until all vectors are visible. Batched: by hand, up to 64 events that are there at "
        "the same time are encoded and stored together. The model that costs nothing is a table "
        f"of vectors by token; its drain is the median of {rounds} rounds.",
        rows,
        [system.name for system in [*ours, *peers]],
        [peer.name for peer in peers],
        [
            "all of them take a COPY: a row trigger fires for each of its rows",
            "the plain recipe keeps no queue: what is notified while its worker is down is lost",
            *systems.what_is_missing(),
        ],
    )
