"""Commit to visible on an idle system, for the listener and each of its peers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

from bench import apart, systems
from bench.cluster import Cluster
from bench.latency import OVERHEAD_TARGETS, TARGETS, measure, quantiles
from bench.models import Model
from bench.report import at_most
from bench.rows import Row
from bench.systems import LISTENER, OPENVINO, System
from bench.texts import random_texts

_FAST = f"{LISTENER}, {OPENVINO}"


def rows(cluster: Cluster, model: Model, tested: Sequence[System], inserts: int) -> list[Row]:
    """p50 and p99, each beside that of a bare `encode` at the same gaps."""
    texts = random_texts(inserts, seed=7)
    samples: dict[str, list[list[float]]] = {}
    with apart.timed(partial(apart.bare, model.directory)) as bare:
        for system in tested:
            systems.prepare(system, model.directory)
            samples[system.name] = measure(cluster, system, model, texts, [bare])
    return [_row(model, samples, place, name) for place, name in enumerate(("p50", "p99"))]


def _row(model: Model, samples: dict[str, list[list[float]]], place: int, name: str) -> Row:
    values = {system: quantiles(visible)[place] for system, (visible, _) in samples.items()}
    # Taken anew beside each system.
    bare = [quantiles(taken)[place] for _, taken in samples.values()]
    verdict = (
        f"{_FAST}: {at_most(values[_FAST], TARGETS[OPENVINO][place])}" if _FAST in values else ""
    )
    if name == "p50":
        overhead = values[LISTENER] - median(samples[LISTENER][1])
        ours = f"overhead {overhead:.2f} {at_most(overhead, OVERHEAD_TARGETS[0])}"
        verdict = f"{ours}; {verdict}" if verdict else ours
    return Row(
        f"commit to visible, idle, {model.name}, {name}",
        "ms",
        f"bare `encode` {name}",
        median(bare),
        values,
        more_is_better=False,
        decimals=1,
        verdict=verdict,
    )
