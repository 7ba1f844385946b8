"""All benchmarks, one after the other on one server, and the report that they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import devices, drain, health, latency, peers, scale, systems, writers
from bench.cluster import Cluster, running_cluster
from bench.machine import describe_machine
from bench.models import GTE_SHAPE, MINILM, find_model
from bench.processes import REPOSITORY
from bench.report import Section

REPORT = REPOSITORY / "_reports" / "bench.md"

_INTRODUCTION = """\
Every figure stands beside a baseline that was measured in the same run. `python -m bench` makes \
this report; `python -m bench NAME` prints one table."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    inserts: int = 200
    texts: int = 5_000
    drain_rounds: int = 3
    models: tuple[str, ...] = (MINILM, GTE_SHAPE)
    sample: int = 500
    clients: tuple[int, ...] = (1, 8, 32, 64)
    seconds: int = 5
    writer_rounds: int = 3
    peer_texts: int = 5_000
    peer_events: int = 10_000
    peer_rounds: int = 3
    peer_inserts: int = 100
    sizes: tuple[int, ...] = scale.SIZES
    backlog: int = 1_000_000
    held_seconds: int = 300


FULL = Sizes()
QUICK = Sizes(
    inserts=20,
    texts=300,
    drain_rounds=1,
    models=(MINILM,),
    sample=100,
    clients=(1, 32),
    seconds=1,
    writer_rounds=1,
    peer_texts=100,
    peer_events=500,
    peer_rounds=1,
    peer_inserts=20,
    sizes=(10_000, 50_000),
    backlog=10_000,
    held_seconds=10,
)


def run_all(sizes: Sizes) -> str:
    """Run everything. Returns the report in Markdown."""
    with running_cluster() as cluster:
        machine = describe_machine(cluster)
        sections = list(_sections(cluster, sizes))
    return _markdown(machine, sections)


def write_report(text: str) -> Path:
    """Replace the last report."""
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(text)
    return REPORT


def _sections(cluster: Cluster, sizes: Sizes) -> Iterator[Section]:
    samples = writers.measure(cluster, sizes.clients, sizes.seconds, sizes.writer_rounds)
    yield peers.run(
        cluster,
        sizes.peer_texts,
        sizes.peer_events,
        sizes.peer_rounds,
        sizes.peer_inserts,
        writers.rows(samples),
    )
    yield writers.section(samples, sizes.seconds)
    for name, engine in _models_and_engines(sizes):
        model = find_model(name, cluster.folder)
        yield latency.run(cluster, model, sizes.inserts, engine)
        yield drain.run(cluster, model, sizes.texts, sizes.drain_rounds, engine)
    yield devices.run(cluster, find_model(MINILM, cluster.folder), sizes.sample)
    yield scale.run(sizes.sizes)
    yield health.backlog(cluster, sizes.backlog)
    yield health.held_snapshot(cluster, sizes.held_seconds)


def _models_and_engines(sizes: Sizes) -> list[tuple[str, str]]:
    """Every engine with the shape of the model that the service takes by default."""
    return [
        (name, engine)
        for name in sizes.models
        for engine in (systems.engines() if name == GTE_SHAPE else [systems.TORCH])
    ]


def _markdown(machine: str, sections: Sequence[Section]) -> str:
    parts = ["# Benchmarks", _INTRODUCTION, machine, *(s.markdown() for s in sections)]
    return "\n\n".join(parts) + "\n"
