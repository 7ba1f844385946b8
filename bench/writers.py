"""What a writer pays: pgbench inserts, side by side with and without our trigger and worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import plain_recipe
from bench.cluster import Cluster, install_listener
from bench.models import static
from bench.pgbench import transactions_per_second
from bench.processes import LoggedProcess, plain_worker, service
from bench.progress import say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_least
from listener.config import Settings
from listener.database import connect

_NOTHING = "no trigger"
_TRIGGER = "listener trigger"
_SERVICE = "listener trigger, service running"
_PLAIN = "plain recipe, worker running"
_PLAIN_TRIGGER = "plain recipe's trigger alone"

_EMBEDDED = "select count(*) from public.event_embeddings"
_TARGET_OF_ONE, _TARGET_OF_MANY, _TARGET_OVER_PLAIN = 0.85, 0.7, 3.0

Worker = Callable[[Cluster, str, Path], AbstractContextManager[LoggedProcess]]


@dataclass(frozen=True)
class Variant:
    """A database of its own, what is installed in it, and who works while the writers write."""

    name: str
    database: str
    install: Callable[[str], None]
    tables: str
    worker: Worker | None = None


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


def _install_plain(url: str) -> None:
    with connect(Settings(database_url=url), "bench") as conn:
        conn.execute(plain_recipe.SCHEMA.encode())


_OURS = "public.iot_events, public.event_embeddings, listener.change, listener.queue"
_THEIRS = "public.iot_events, public.event_embeddings"
_VARIANTS = (
    Variant(_NOTHING, "writers_nothing", _install_nothing, "public.iot_events"),
    Variant(_TRIGGER, "writers_trigger", install_listener, _OURS),
    Variant(_SERVICE, "writers_service", install_listener, _OURS, service),
    Variant(_PLAIN, "writers_plain", _install_plain, _THEIRS, plain_worker),
    Variant(_PLAIN_TRIGGER, "writers_plain_trigger", _install_plain, _THEIRS),
)


def run(cluster: Cluster, clients: Sequence[int], seconds: int, rounds: int) -> Section:
    """Short runs of all variants in turn, the order turned round every other round."""
    model = static(cluster.folder)
    samples: list[Sample] = []
    with ExitStack() as stack:
        urls = {v.name: stack.enter_context(_database(cluster, v)) for v in _VARIANTS}
        for number in range(rounds):
            for count in clients:
                for variant in _VARIANTS if number % 2 == 0 else reversed(_VARIANTS):
                    url = urls[variant.name]
                    tps, embedded = _sample(cluster, variant, url, model, count, seconds)
                    samples.append(Sample(number, count, variant.name, tps, embedded))
                    say(
                        f"writers: round {number + 1} of {rounds}, {count} clients, "
                        f"{variant.name}: {tps:.0f} tps"
                    )
    return _section(samples, clients, seconds, rounds)


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
        conn.execute(f"truncate {variant.tables}".encode())
    return tps, embedded / seconds


def _embedded(url: str) -> int:
    with connect(Settings(database_url=url), "bench") as conn:
        row = conn.execute(_EMBEDDED).fetchone()
    assert row is not None
    return int(row[0])


def _section(
    samples: Sequence[Sample], clients: Sequence[int], seconds: int, rounds: int
) -> Section:
    rows = [
        _row(samples, count, variant.name, _baseline_and_target(variant.name, count))
        for count in clients
        for variant in _VARIANTS
    ]
    return Section(
        "Writers",
        f"pgbench, prepared single-row inserts, {rounds} rounds of {seconds} s each, the variants "
        "in turn, each on a database of its own, all on one server, on the same cores as pgbench "
        "and the workers. tps is the median of the rounds; a ratio is the median of the rounds' "
        "ratios. The workers have a static-embedding model, which costs next to nothing; started "
        "before each of their runs, ended after it. The listener's trigger alone runs with its "
        "gate open, that is, without NOTIFY. The plain recipe: a row trigger with `pg_notify` of "
        "the id, a worker that encodes and inserts one event at a time.",
        ("clients", "variant", "tps", "of no trigger", "of plain recipe", "target", "embedded/s"),
        tuple(rows),
        (
            "embedded/s: vectors stored while the writers wrote; the rest waits in the queue, "
            "and is left out of account",
        ),
    )


def _baseline_and_target(variant: str, clients: int) -> tuple[str, float] | None:
    if variant == _TRIGGER:
        return _NOTHING, _TARGET_OF_ONE if clients == 1 else _TARGET_OF_MANY
    if variant == _SERVICE and clients >= 32:
        return _PLAIN, _TARGET_OVER_PLAIN
    return None


def _row(
    samples: Sequence[Sample], clients: int, variant: str, target: tuple[str, float] | None
) -> tuple[str, ...]:
    own = [s for s in samples if s.clients == clients and s.variant == variant]
    of_nothing = _ratio(samples, clients, variant, _NOTHING)
    of_plain = _ratio(samples, clients, variant, _PLAIN)
    verdict = ""
    if target is not None:
        ratio = of_nothing if target[0] == _NOTHING else of_plain
        verdict = f"{at_least(ratio, target[1])} (of {target[0]})"
    embedded = median(s.embedded for s in own)
    return (
        str(clients),
        variant,
        f"{median(s.tps for s in own):.0f}",
        f"{of_nothing:.3f}",
        f"{of_plain:.2f}",
        verdict,
        f"{embedded:.0f}" if embedded else "",
    )


def _ratio(samples: Sequence[Sample], clients: int, variant: str, baseline: str) -> float:
    """The median over the rounds of the ratio within a round."""
    tps = {(s.round, s.variant): s.tps for s in samples if s.clients == clients}
    rounds = {number for number, _ in tps}
    return median(tps[number, variant] / tps[number, baseline] for number in rounds)
