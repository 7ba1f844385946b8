"""Short runs of pgbench, many variants in turn, each on a database of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.cluster import Cluster
from bench.models import static
from bench.pgbench import transactions_per_second
from bench.progress import say
from bench.quiet import wait_for_quiet
from bench.systems import Worker
from listener.config import Settings
from listener.database import connect

_EMBEDDED = "select count(*) from public.event_embeddings"
_TABLES = """
select string_agg(format('%I.%I', t.schemaname, t.tablename), ', ')
from pg_catalog.pg_tables t
where t.schemaname = 'public'
  or t.schemaname = 'listener' and t.tablename in ('queue', 'change')
"""


@dataclass(frozen=True)
class Variant:
    """A database of its own, what is installed in it, and who works while the writers write."""

    name: str
    database: str
    install: Callable[[str], None]
    worker: Worker | None = None
    fewest_clients: int = 1


@dataclass(frozen=True)
class Sample:
    """One short run of pgbench; `embedded` vectors a second meanwhile, 0 without a worker."""

    round: int
    clients: int
    variant: str
    tps: float
    embedded: float


def measure_variants(
    cluster: Cluster,
    variants: Sequence[Variant],
    clients: Sequence[int],
    seconds: int,
    rounds: int,
    model: Path | None = None,
) -> list[Sample]:
    """Short runs of all variants in turn, the order turned round every other round.

    The workers have `model`; None is one that costs next to nothing.
    """
    model = model or static(cluster.folder)
    samples: list[Sample] = []
    with ExitStack() as stack:
        urls = {v.name: stack.enter_context(_database(cluster, v)) for v in variants}
        for number in range(rounds):
            for count in clients:
                fit = [v for v in variants if v.fewest_clients <= count]
                for variant in fit if number % 2 == 0 else reversed(fit):
                    url = urls[variant.name]
                    rate, embedded = _sample(cluster, variant, url, model, count, seconds)
                    samples.append(Sample(number, count, variant.name, rate, embedded))
                    say(
                        f"writers: round {number + 1} of {rounds}, {count} clients, "
                        f"{variant.name}: {rate:.0f} tps"
                    )
    return samples


@contextmanager
def _database(cluster: Cluster, variant: Variant) -> Iterator[str]:
    with cluster.database(variant.database) as url:
        variant.install(url)
        yield url


def _sample(
    cluster: Cluster, variant: Variant, url: str, model: Path, clients: int, seconds: int
) -> tuple[float, float]:
    """The worker lives for this run only, so that its backlog burdens no other."""
    with ExitStack() as stack:
        if variant.worker is not None:
            stack.enter_context(variant.worker(cluster, url, model))
        with cluster.admin() as admin:
            # So that no run pays for the pages that another one wrote.
            admin.execute("checkpoint")
        wait_for_quiet()
        rate = transactions_per_second(cluster, variant.database, clients, seconds)
        embedded = _embedded(url) if variant.worker is not None else 0
    with connect(Settings(database_url=url), "bench") as conn:
        tables = conn.execute(_TABLES).fetchone()
        assert tables is not None
        conn.execute(f"truncate {tables[0]}".encode())
    return rate, embedded / seconds


def _embedded(url: str) -> int:
    with connect(Settings(database_url=url), "bench") as conn:
        row = conn.execute(_EMBEDDED).fetchone()
    assert row is not None
    return int(row[0])


def tps(samples: Sequence[Sample], clients: int, variant: str) -> float:
    """The median of the rounds."""
    return median(s.tps for s in samples if s.clients == clients and s.variant == variant)


def ratio(samples: Sequence[Sample], clients: int, variant: str, baseline: str) -> float:
    """The median over the rounds of the ratio within a round."""
    found = {(s.round, s.variant): s.tps for s in samples if s.clients == clients}
    rounds = {number for number, _ in found}
    return median(found[number, variant] / found[number, baseline] for number in rounds)
