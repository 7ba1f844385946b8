"""What a writer pays: pgbench inserts, with and without each system's trigger and worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import plain_recipe, systems
from bench.cluster import Cluster
from bench.models import static
from bench.pgbench import transactions_per_second
from bench.progress import say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_least
from bench.rows import Row
from bench.systems import LISTENER, Worker
from listener.config import Settings
from listener.database import connect

NOTHING = "no trigger"
TRIGGER = "listener's trigger alone"
PLAIN = "plain recipe"
PLAIN_TRIGGER = "plain recipe's trigger alone"

# The peers' workers slow few writers little, and each run takes its time.
MANY_CLIENTS = 32

_EMBEDDED = "select count(*) from public.event_embeddings"
_TABLES = """
select string_agg(format('%I.%I', t.schemaname, t.tablename), ', ')
from pg_catalog.pg_tables t
where t.schemaname = 'public'
  or t.schemaname = 'listener' and t.tablename in ('queue', 'change')
"""
_TARGET_OF_ONE, _TARGET_OF_MANY, _TARGET_OVER_PLAIN = 0.9, 0.75, 4.0


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


def _install_nothing(url: str) -> None:
    """The baseline is the bare table."""


def _variants() -> list[Variant]:
    ours = systems.listener()
    return [
        Variant(NOTHING, "writers_nothing", _install_nothing),
        Variant(TRIGGER, "writers_trigger", ours.install),
        Variant(ours.name, "writers_service", ours.install, ours.worker),
        Variant(PLAIN_TRIGGER, "writers_plain_trigger", plain_recipe.install),
        *(
            Variant(
                peer.name,
                f"writers_{peer.slug}",
                peer.install,
                peer.worker,
                1 if peer.name == PLAIN else MANY_CLIENTS,
            )
            for peer in systems.peers()
        ),
    ]


def measure(cluster: Cluster, clients: Sequence[int], seconds: int, rounds: int) -> list[Sample]:
    """Short runs of all variants in turn, the order turned round every other round."""
    model, variants = static(cluster.folder), _variants()
    samples: list[Sample] = []
    with ExitStack() as stack:
        urls = {v.name: stack.enter_context(_database(cluster, v)) for v in variants}
        for number in range(rounds):
            for count in clients:
                fit = [v for v in variants if v.fewest_clients <= count]
                for variant in fit if number % 2 == 0 else reversed(fit):
                    url = urls[variant.name]
                    tps, embedded = _sample(cluster, variant, url, model, count, seconds)
                    samples.append(Sample(number, count, variant.name, tps, embedded))
                    say(
                        f"writers: round {number + 1} of {rounds}, {count} clients, "
                        f"{variant.name}: {tps:.0f} tps"
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
        tps = transactions_per_second(cluster, variant.database, clients, seconds)
        embedded = _embedded(url) if variant.worker is not None else 0
    with connect(Settings(database_url=url), "bench") as conn:
        tables = conn.execute(_TABLES).fetchone()
        assert tables is not None
        conn.execute(f"truncate {tables[0]}".encode())
    return tps, embedded / seconds


def _embedded(url: str) -> int:
    with connect(Settings(database_url=url), "bench") as conn:
        row = conn.execute(_EMBEDDED).fetchone()
    assert row is not None
    return int(row[0])


def section(samples: Sequence[Sample], seconds: int) -> Section:
    """Every variant at every number of clients."""
    rounds = 1 + max(sample.round for sample in samples)
    measured = dict.fromkeys((sample.clients, sample.variant) for sample in samples)
    return Section(
        "Writers",
        f"pgbench, prepared single-row inserts, {rounds} rounds of {seconds} s each, the variants "
        "in turn, each on a database of its own, all on one server, on the same cores as pgbench "
        "and the workers. Where the trigger is not said to be alone, the system's worker runs. tps "
        "is the median of the rounds; a ratio is the median of the rounds' ratios. The workers "
        "have a static-embedding model, which costs next to nothing; started before each of their "
        "runs, ended after it. The listener's trigger alone runs with its gate open, that is, "
        f"without NOTIFY. Peers other than the plain recipe from {MANY_CLIENTS} clients on.",
        ("clients", "variant", "tps", "of no trigger", "of plain recipe", "target", "embedded/s"),
        tuple(_cells(samples, clients, variant) for clients, variant in measured),
        (
            "embedded/s: vectors stored while the writers wrote; the rest waits in the queue, "
            "and is left out of account",
        ),
    )


def rows(samples: Sequence[Sample]) -> list[Row]:
    """For the table beside the peers: their workers running, many clients."""
    counts = dict.fromkeys(s.clients for s in samples if s.clients >= MANY_CLIENTS)
    return [_row(samples, clients) for clients in counts]


def _row(samples: Sequence[Sample], clients: int) -> Row:
    here = [s for s in samples if s.clients == clients]
    working = [s.variant for s in here if s.variant not in (NOTHING, TRIGGER, PLAIN_TRIGGER)]
    of_plain = _ratio(samples, clients, LISTENER, PLAIN)
    return Row(
        f"writers, {clients} clients, worker running",
        "tps",
        NOTHING,
        _tps(samples, clients, NOTHING),
        {name: _tps(samples, clients, name) for name in working},
        verdict=f"{of_plain:.2f} times the plain recipe, {at_least(of_plain, _TARGET_OVER_PLAIN)}",
    )


def _cells(samples: Sequence[Sample], clients: int, variant: str) -> tuple[str, ...]:
    of_nothing = _ratio(samples, clients, variant, NOTHING)
    of_plain = _ratio(samples, clients, variant, PLAIN)
    verdict = ""
    if variant == TRIGGER:
        target = _TARGET_OF_ONE if clients == 1 else _TARGET_OF_MANY
        verdict = f"{at_least(of_nothing, target)} (of {NOTHING})"
    elif variant == LISTENER and clients >= MANY_CLIENTS:
        verdict = f"{at_least(of_plain, _TARGET_OVER_PLAIN)} (of {PLAIN})"
    own = [s.embedded for s in samples if s.clients == clients and s.variant == variant]
    return (
        str(clients),
        variant,
        f"{_tps(samples, clients, variant):.0f}",
        f"{of_nothing:.3f}",
        f"{of_plain:.2f}",
        verdict,
        f"{median(own):.0f}" if median(own) else "",
    )


def _tps(samples: Sequence[Sample], clients: int, variant: str) -> float:
    return median(s.tps for s in samples if s.clients == clients and s.variant == variant)


def _ratio(samples: Sequence[Sample], clients: int, variant: str, baseline: str) -> float:
    """The median over the rounds of the ratio within a round."""
    tps = {(s.round, s.variant): s.tps for s in samples if s.clients == clients}
    rounds = {number for number, _ in tps}
    return median(tps[number, variant] / tps[number, baseline] for number in rounds)
