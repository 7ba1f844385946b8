"""What a writer pays: pgbench inserts, with and without each system's trigger and worker."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench import plain_recipe, systems
from bench.cluster import Cluster
from bench.report import Section, at_least
from bench.rows import Row
from bench.systems import LISTENER
from bench.writer_runs import Sample, Variant, measure_variants, ratio, tps

NOTHING = "no trigger"
TRIGGER = "listener's trigger alone"
PLAIN = "plain recipe"
PLAIN_TRIGGER = "plain recipe's trigger alone"

# The peers' workers slow few writers little, and each run takes its time.
MANY_CLIENTS = 32

_TARGET_OF_ONE, _TARGET_OF_MANY, _TARGET_OVER_PLAIN = 0.9, 0.75, 4.0


def install_nothing(url: str) -> None:
    """The baseline is the bare table."""


def _variants() -> list[Variant]:
    ours = systems.listener()
    return [
        Variant(NOTHING, "writers_nothing", install_nothing),
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
    """Every variant."""
    return measure_variants(cluster, _variants(), clients, seconds, rounds)


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
    of_plain = ratio(samples, clients, LISTENER, PLAIN)
    return Row(
        f"writers, {clients} clients, worker running",
        "tps",
        NOTHING,
        tps(samples, clients, NOTHING),
        {name: tps(samples, clients, name) for name in working},
        verdict=f"{of_plain:.2f} times the plain recipe, {at_least(of_plain, _TARGET_OVER_PLAIN)}",
    )


def _cells(samples: Sequence[Sample], clients: int, variant: str) -> tuple[str, ...]:
    of_nothing = ratio(samples, clients, variant, NOTHING)
    of_plain = ratio(samples, clients, variant, PLAIN)
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
        f"{tps(samples, clients, variant):.0f}",
        f"{of_nothing:.3f}",
        f"{of_plain:.2f}",
        verdict,
        f"{median(own):.0f}" if median(own) else "",
    )
