"""A backlog of distinct texts, drained by the service, against one bare call of the model."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from bench import systems
from bench.bare_encode import bare_seconds
from bench.cluster import Cluster
from bench.models import Model
from bench.peer_table import BATCH_SIZE
from bench.progress import BenchError, say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_least
from bench.systems import OPENVINO, OPENVINO_BF16, TORCH, System
from bench.texts import copy_messages, embedded_texts, random_texts
from listener.config import Settings
from listener.database import connect

# Of the bare torch encode. The other engines run the same model faster.
TARGETS = {TORCH: 0.97, OPENVINO: 1.1, OPENVINO_BF16: 2.0}
_PATIENCE_SECONDS = 600.0
_LACKING = """
select count(*)
from public.iot_events e
left join public.event_embeddings m on m.event_id = e.id
where m.event_id is null
"""


@dataclass(frozen=True)
class Round:
    """Seconds for the same texts, one after the other on the same machine."""

    bare: float
    service: float

    @property
    def ratio(self) -> float:
        """1: the service adds nothing to the model."""
        return self.bare / self.service


def run(cluster: Cluster, model: Model, texts: int, rounds: int, engine: str) -> Section:
    """Each round a fresh database, a fresh bare process and a fresh service."""
    system = systems.listener(engine)
    systems.prepare(system, model.directory)
    measured = []
    for number in range(rounds):
        measured.append(_round(cluster, system, model, texts, seed=number))
        say(
            f"drain: {model.name}, {engine}, round {number + 1} of {rounds}: bare "
            f"{measured[-1].bare:.2f} s, service {measured[-1].service:.2f} s"
        )
    return _section(model, engine, texts, measured)


def _round(cluster: Cluster, system: System, model: Model, count: int, seed: int) -> Round:
    with cluster.database("drain") as url:
        system.install(url)
        copy_messages(url, random_texts(count, seed))
        texts = embedded_texts(url)
        wait_for_quiet()
        bare = bare_seconds(model.directory, texts, cluster.folder)
        wait_for_quiet()
        with system.worker(cluster, url, model.directory) as process:
            batches = process.wait_for_stored(count, _PATIENCE_SECONDS)
            seconds = batches[-1].seconds - process.wait_for("listening").seconds
        require_all_embedded(url)
    return Round(bare, seconds)


def require_all_embedded(url: str) -> None:
    """Raise BenchError if an event lacks its vector."""
    with connect(Settings(database_url=url), "bench") as conn:
        row = conn.execute(_LACKING).fetchone()
    if row is None or row[0]:
        raise BenchError(f"events without a vector after the drain: {row}")


def _section(model: Model, engine: str, texts: int, rounds: list[Round]) -> Section:
    rows = [
        (
            str(number),
            f"{one.bare:.2f}",
            f"{one.service:.2f}",
            f"{texts / one.service:.0f}",
            f"{one.ratio:.3f}",
        )
        for number, one in enumerate(rounds, start=1)
    ]
    ratio = median(one.ratio for one in rounds)
    return Section(
        f"Drain, model {model.name}, engine {engine}",
        f"{texts} distinct texts of about 20 tokens, inserted while no service runs. Bare: a "
        f"process of its own that calls `SentenceTransformer.encode(texts, "
        f"batch_size={BATCH_SIZE})` with torch on the very texts, loading not counted. Service: "
        "from LISTEN live, before the first claim, to the commit of the last vector, both by the "
        "service's log. A fresh database and fresh processes each round; the ratio is bare by "
        "service.",
        ("round", "bare, s", "service, s", "events/s", "ratio"),
        (
            *rows,
            ("**median**", "", "", "", f"**{ratio:.3f}** ({at_least(ratio, TARGETS[engine])})"),
        ),
    )
