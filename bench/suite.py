"""All benchmarks, one after the other on one server, and the report that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench import (
    devices,
    drain,
    footprint,
    health,
    latency,
    peers,
    plots,
    precision,
    scale,
    systems,
    trigger_parts,
    writers,
    writes,
)
from bench.cluster import Cluster, running_cluster
from bench.machine import describe_machine, machine_in_a_line
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
    idle_seconds: int = 60
    rows: tuple[int, ...] = writes.SIZES
    filled: int = 10_000


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
    peer_texts=60,
    peer_events=500,
    peer_rounds=1,
    peer_inserts=10,
    sizes=(10_000, 50_000),
    backlog=10_000,
    held_seconds=10,
    idle_seconds=5,
    rows=(1, 256),
    filled=1_000,
)


def run_all(sizes: Sizes, report: Path | None) -> str:
    """Run everything. Returns the report in Markdown.

    It is written to `report`, the pictures beside it; None leaves no file behind.
    """
    with running_cluster() as cluster:
        machine = describe_machine(cluster)
        pictures = report.parent if report else cluster.folder
        pictures.mkdir(exist_ok=True)
        parts = [f"# Benchmarks\n\n{_INTRODUCTION}", machine]
        for part in _parts(cluster, sizes, pictures):
            parts.append(part)
            text = "\n\n".join(parts) + "\n"
            # At each step: hours of measurements shall not be lost to the last one's failure.
            if report:
                report.write_text(text)
    return text


def _parts(cluster: Cluster, sizes: Sizes, pictures: Path) -> Iterator[str]:
    """Sections, and lines that show a picture of the section before."""
    machine = machine_in_a_line(cluster)
    drains = peers.drain_rows(cluster, sizes.peer_texts, sizes.peer_events, sizes.peer_rounds)
    latencies = peers.latency_rows(cluster, sizes.peer_inserts)
    samples = writers.measure(cluster, sizes.clients, sizes.seconds, sizes.writer_rounds)
    rows = [*drains, *latencies, *writers.rows(samples)]
    yield peers.section(rows, sizes.peer_rounds).markdown()
    plots.draw_rows(drains, "Drain, one worker", machine, pictures / "bench_drain.svg")
    plots.draw_rows(latencies, "Latency, one worker", machine, pictures / "bench_latency.svg")
    yield "![Drain](bench_drain.svg)\n\n![Latency](bench_latency.svg)"
    yield writers.section(samples, sizes.seconds).markdown()
    plots.draw_writers(samples, machine, pictures / "bench_writers.svg")
    yield "![Writers](bench_writers.svg)"
    model = find_model(sizes.models[-1], cluster.folder)
    many = [writers.MANY_CLIENTS]
    samples = writers.measure(cluster, many, sizes.seconds, sizes.writer_rounds, model)
    yield writers.section(samples, sizes.seconds, model).markdown()
    for section in _sections(cluster, sizes):
        yield section.markdown()


def _sections(cluster: Cluster, sizes: Sizes) -> Iterator[Section]:
    for name, engine in product(sizes.models, systems.all_engines()):
        model = find_model(name, cluster.folder)
        yield latency.run(cluster, model, sizes.inserts, engine)
        yield drain.run(cluster, model, sizes.texts, sizes.drain_rounds, engine)
        yield footprint.run(cluster, model, sizes.idle_seconds, engine)
    yield precision.run(find_model(MINILM, cluster.folder), sizes.sample)
    for engine in systems.engines():
        yield devices.run(cluster, find_model(MINILM, cluster.folder), sizes.sample, engine)
    yield trigger_parts.run(cluster, trigger_parts.CLIENTS, sizes.seconds, sizes.writer_rounds)
    yield writes.run(cluster, sizes.rows, sizes.filled)
    yield health.backlog(cluster, sizes.backlog)
    yield health.held_snapshot(cluster, sizes.held_seconds)
    yield scale.run(sizes.sizes)
