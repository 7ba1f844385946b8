"""What a writer pays: pgbench inserts, with and without each system's trigger and worker."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench import plain_recipe, systems
from bench.cluster import Cluster
from bench.models import Model
from bench.report import Section, at_least
from bench.rows import Row
from bench.systems import LISTENER
from bench.writer_runs import Sample, Variant, measure_variants, ratio, tps

NOTHING = "no trigger"
TRIGGER = "listener's trigger alone"
PLAIN = "plain recipe"
PLAIN_TRIGGER = "plain recipe's trigger alone"
_OURS_AND_PLAIN = (NOTHING, TRIGGER, LISTENER, PLAIN)
_ENCODING = (NOTHING, LISTENER, PLAIN, f"{PLAIN}, batched")

# The peers' workers slow few writers little, and each run takes its time.
MANY_CLIENTS = 32

_TARGET_OF_ONE, _TARGET_OF_MANY, _TARGET_OVER_PLAIN = 0.9, 0.75, 4.0


def install_nothing(url: str) -> None:
    """The baseline is the bare table."""


def _variants(engine: str = systems.AUTO) -> list[Variant]:
    ours = systems.listener(engine)
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


def measure(
    cluster: Cluster,
    clients: Sequence[int],
    seconds: int,
    rounds: int,
    model: Model | None = None,
    *,
    only_plain: bool = False,
) -> list[Sample]:
    """Every variant; with a model, the listener and the plain recipe while they encode with it.

    `only_plain` leaves out every peer but the plain recipe.
    """
    if model is None:
        kept = [v for v in _variants() if not only_plain or v.name in _OURS_AND_PLAIN]
        return measure_variants(cluster, kept, clients, seconds, rounds)
    kept = [v for v in _variants(systems.TORCH) if v.name in _ENCODING]
    return measure_variants(cluster, kept, clients, seconds, rounds, model.directory)


def section(samples: Sequence[Sample], seconds: int, model: Model | None = None) -> Section:
    """Every variant at every number of clients; `model` as in `measure`."""
    rounds = 1 + max(sample.round for sample in samples)
    measured = dict.fromkeys((sample.clients, sample.variant) for sample in samples)
    workers = (
        "The workers encode with a model that takes all the processor that it gets, and with torch."
        if model
        else "The workers have a static-embedding model, which costs next to nothing; the listener "
        "computes it by itself, the others call the library. The listener's trigger alone runs "
        "with its gate open, that is, without NOTIFY. Peers other than the plain recipe from "
        f"{MANY_CLIENTS} clients on."
    )
    return Section(
        f"Writers, model {model.name}" if model else "Writers",
        f"pgbench, prepared single-row inserts, {rounds} rounds of {seconds} s each, the variants "
        "in turn, each on a database of its own, all on one server, on the same cores as pgbench "
        "and the workers. Where the trigger is not said to be alone, the system's worker runs, "
        "started before each of its runs, ended after it. tps is the median of the rounds; a ratio "
        f"is the median of the rounds' ratios. {workers} The listener has nice 10, which it takes "
        "by itself; the others have none.",
        ("clients", "variant", "tps", "of no trigger", "of plain recipe", "target", "embedded/s"),
        tuple(_cells(samples, *one, has_target=model is None) for one in measured),
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


def _target(samples: Sequence[Sample], clients: int, variant: str) -> str:
    if variant == TRIGGER:
        target = _TARGET_OF_ONE if clients == 1 else _TARGET_OF_MANY
        return f"{at_least(ratio(samples, clients, variant, NOTHING), target)} (of {NOTHING})"
    if variant == LISTENER and clients >= MANY_CLIENTS:
        of_plain = ratio(samples, clients, variant, PLAIN)
        return f"{at_least(of_plain, _TARGET_OVER_PLAIN)} (of {PLAIN})"
    return ""


def _cells(
    samples: Sequence[Sample], clients: int, variant: str, *, has_target: bool
) -> tuple[str, ...]:
    own = [s.embedded for s in samples if s.clients == clients and s.variant == variant]
    return (
        str(clients),
        variant,
        f"{tps(samples, clients, variant):.0f}",
        f"{ratio(samples, clients, variant, NOTHING):.3f}",
        f"{ratio(samples, clients, variant, PLAIN):.2f}",
        _target(samples, clients, variant) if has_target else "",
        f"{median(own):.0f}" if median(own) else "",
    )
