"""All benchmarks, one after the other on one server, and the report that they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import devices, drain, latency, writers
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
    drain_models: tuple[str, ...] = (MINILM, GTE_SHAPE)
    sample: int = 500
    clients: tuple[int, ...] = (1, 8, 32)
    seconds: int = 5
    writer_rounds: int = 5


FULL = Sizes()
QUICK = Sizes(
    inserts=20,
    texts=300,
    drain_rounds=1,
    drain_models=(MINILM,),
    sample=100,
    clients=(1, 32),
    seconds=1,
    writer_rounds=1,
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
    minilm = find_model(MINILM, cluster.folder)
    yield latency.run(cluster, minilm, sizes.inserts)
    for name in sizes.drain_models:
        model = find_model(name, cluster.folder)
        yield drain.run(cluster, model, sizes.texts, sizes.drain_rounds)
    yield devices.run(cluster, minilm, sizes.sample)
    yield writers.run(cluster, sizes.clients, sizes.seconds, sizes.writer_rounds)


def _markdown(machine: str, sections: Sequence[Section]) -> str:
    parts = ["# Benchmarks", _INTRODUCTION, machine, *(s.markdown() for s in sections)]
    return "\n\n".join(parts) + "\n"
