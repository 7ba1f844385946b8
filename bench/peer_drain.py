"""From the commit of one COPY to all vectors visible, for the listener and each of its peers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench import peer_table, systems
from bench.bare_encode import bare_seconds
from bench.cluster import Cluster
from bench.drain import TARGETS
from bench.models import Model, static
from bench.peer_table import BATCH_SIZE
from bench.progress import say
from bench.quiet import wait_for_quiet
from bench.report import at_least
from bench.rows import Row
from bench.systems import LISTENER, OPENVINO, TORCH, System
from bench.texts import copy_messages, random_texts
from bench.visible import wait_until_all_visible
from listener.config import Settings
from listener.database import connect

_PATIENCE_SECONDS = 1200.0
_TARGETS = {LISTENER: TARGETS[TORCH], f"{LISTENER}, {OPENVINO}": TARGETS[OPENVINO]}
_TARGET_OF_QUEUE, _AIM_OF_QUEUE = 6_000, 8_000
_STORED_TOGETHER = 256


def model_row(cluster: Cluster, model: Model, systems: Sequence[System], count: int) -> Row:
    """What is left of the model's own speed."""
    texts = random_texts(count, seed=5)
    wait_for_quiet()
    bare = count / bare_seconds(model.directory, texts, cluster.folder)
    rates = {s.name: count / drain_seconds(cluster, s, model.directory, texts) for s in systems}
    verdicts = (
        f"{name}: {at_least(rates[name] / bare, target)}"
        for name, target in _TARGETS.items()
        if name in rates
    )
    return Row(
        f"drain of {count} texts, {model.name}",
        "events/s",
        f"`encode(batch_size={BATCH_SIZE})`",
        bare,
        rates,
        decimals=1,
        verdict="; ".join(verdicts),
    )


def queue_row(cluster: Cluster, systems: Sequence[System], count: int, rounds: int) -> Row:
    """The queue alone: a model that costs nothing. Medians of the rounds, the systems in turn."""
    model = static(cluster.folder)
    texts = random_texts(count, seed=6)
    bare: list[float] = []
    rates: dict[str, list[float]] = {system.name: [] for system in systems}
    for number in range(rounds):
        bare.append(count / _seconds_without_queue(cluster, model, texts))
        for system in systems if number % 2 == 0 else reversed(systems):
            rates[system.name].append(count / drain_seconds(cluster, system, model, texts))
    medians = {name: median(values) for name, values in rates.items()}
    aim = f"aim {_AIM_OF_QUEUE}: {'reached' if medians[LISTENER] >= _AIM_OF_QUEUE else 'missed'}"
    return Row(
        f"drain of {count} texts, a model that costs nothing",
        "events/s",
        f"read all, encode, store {_STORED_TOGETHER} at a time",
        median(bare),
        medians,
        verdict=f"{at_least(medians[LISTENER], _TARGET_OF_QUEUE)}, {aim}",
    )


def drain_seconds(cluster: Cluster, system: System, model: Path, texts: Sequence[str]) -> float:
    """From the COPY's commit, the worker awake and idle, to the last vector."""
    systems.prepare(system, model)
    with cluster.database(f"drain_{system.slug}") as url:
        system.install(url)
        with (
            system.worker(cluster, url, model) as process,
            connect(Settings(database_url=url), "bench") as conn,
        ):
            # Shows that the worker has got through to its LISTEN, and fills its caches.
            copy_messages(url, ["the first event"])
            wait_until_all_visible(conn, process, _PATIENCE_SECONDS)
            wait_for_quiet()
            committed = copy_messages(url, texts)
            seconds = wait_until_all_visible(conn, process, _PATIENCE_SECONDS) - committed
    say(f"drain: {system.name}: {len(texts) / seconds:.0f} events/s")
    return seconds


def _seconds_without_queue(cluster: Cluster, directory: Path, texts: Sequence[str]) -> float:
    """The same work with nothing that would find it again after a crash."""
    store = peer_table.STORE_MANY.format("%s", "%b")
    model = peer_table.load_model(str(directory))
    with cluster.database("drain_without_queue") as url:
        with connect(Settings(database_url=url), "bench") as conn:
            conn.execute(peer_table.SCHEMA)
        copy_messages(url, texts)
        with connect(Settings(database_url=peer_table.worker_url(url)), "bench") as conn:
            peer_table.encode(model, ["warm"])
            wait_for_quiet()
            began = time.perf_counter()
            rows = conn.execute("select id, message from public.iot_events order by id").fetchall()
            for start in range(0, len(rows), _STORED_TOGETHER):
                some = rows[start : start + _STORED_TOGETHER]
                vectors = peer_table.encode(model, [text for _, text in some])
                conn.execute(store.encode(), ([number for number, _ in some], list(vectors)))
            return time.perf_counter() - began
