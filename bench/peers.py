"""The listener beside what a user would take instead, in one table."""

from __future__ import annotations

from collections.abc import Sequence

from bench import peer_drain, peer_latency, systems
from bench.cluster import Cluster
from bench.models import GTE_SHAPE, find_model
from bench.peer_table import BATCH_SIZE
from bench.report import Section
from bench.rows import Row, table
from bench.systems import System

CLIENTS = (32, 64)
KINDS = DRAIN, LATENCY, WRITERS = ("drain", "latency", "writers")


def drain_rows(cluster: Cluster, texts: int, events: int, rounds: int) -> list[Row]:
    """With a real model's cost, and with none."""
    model = find_model(GTE_SHAPE, cluster.folder)
    return [
        peer_drain.model_row(cluster, model, [*_ours(), *systems.peers()], texts),
        # The engine makes no difference to a static model.
        peer_drain.queue_row(cluster, [systems.listener(), *systems.peers()], events, rounds),
    ]


def latency_rows(cluster: Cluster, inserts: int) -> list[Row]:
    """On an idle system."""
    model = find_model(GTE_SHAPE, cluster.folder)
    return peer_latency.rows(cluster, model, [*_ours(), *systems.peers()], inserts)


def section(rows: Sequence[Row], rounds: int) -> Section:
    """One table of all rows."""
    return table(
        "Beside its peers",
        "Each cell is the figure and, in brackets, its ratio to the row's baseline, measured in "
        "the same run on the same server. One worker each, with default settings or those that "
        "its documentation advises; each embeds the same column with the same model, and no "
        "worker's commit waits for the disk. A drain runs from the return of one COPY, the worker "
        "idle, until all vectors are visible. Batched: by hand, up to "
        f"{BATCH_SIZE} events that are there at the same time are encoded and stored together. "
        "The model that costs nothing is a table of vectors by word; its drain is the median of "
        f"{rounds} rounds.",
        rows,
        [system.name for system in [*_ours(), *systems.peers()]],
        [peer.name for peer in systems.peers()],
        [
            "all of them take a COPY: a row trigger fires for each of its rows",
            "the plain recipe keeps no queue: what is notified while its worker is down is lost",
            *systems.what_is_missing(),
        ],
    )


def _ours() -> list[System]:
    return [systems.listener(engine) for engine in systems.engines()]
