"""Real device events: each text encoded once, and neighbours that mean the same."""

from __future__ import annotations

import csv
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from bench import systems
from bench.bare_encode import bare_seconds
from bench.cluster import Cluster, install_listener
from bench.drain import require_all_embedded
from bench.models import Model
from bench.peer_table import BATCH_SIZE
from bench.processes import REPOSITORY, Line
from bench.progress import say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_least
from bench.systems import System
from bench.texts import embedded_texts
from listener.config import Settings
from listener.database import Connection, connect

_DATA_SET = REPOSITORY.parent / "shared" / "data" / "device_events.csv"

_TITLE = "Real device events"
_COLUMNS = ("device_id", "event_type", "severity", "message", "created_at")
_COPY = """
copy public.iot_events (device_id, event_type, severity, message, created_at) from stdin
"""
_PATIENCE_SECONDS = 600.0
_NEIGHBOURS = 10
# Times as fast as the bare model.
_TARGET = 2.0

_NEAREST_EVENTS = """
select s.event_id, n.event_id
from unnest(%(sample)s::bigint[]) as s (event_id)
join public.event_embeddings q on q.event_id = s.event_id
cross join lateral (
  select m.event_id
  from public.event_embeddings m
  where m.event_id <> q.event_id
  order by m.embedding <=> q.embedding
  limit %(neighbours)s
) n
"""

# One event for each text: a text that repeats could else fill all ten places.
_NEAREST_TEXTS = """
with texts as materialized (
  select distinct on (m.content_hash) m.event_id, m.content_hash, m.embedding
  from public.event_embeddings m
  order by m.content_hash, m.event_id
)
select s.event_id, n.event_id
from unnest(%(sample)s::bigint[]) as s (event_id)
join public.event_embeddings q on q.event_id = s.event_id
cross join lateral (
  select t.event_id
  from texts t
  where t.content_hash <> q.content_hash
  order by t.embedding <=> q.embedding
  limit %(neighbours)s
) n
"""


@dataclass(frozen=True)
class Precision:
    """Shares of the neighbours that have the event's template; `chance` by drawing at random."""

    found: float
    chance: float


@dataclass(frozen=True)
class Drained:
    """The events all embedded: the texts in order, seconds, and what the model saw."""

    texts: list[str]
    seconds: float
    encoded: int
    reused: int


def run(cluster: Cluster, model: Model, sample: int, engine: str) -> Section:
    """One COPY of all events to a service that sleeps; a line instead if the data isn't there."""
    system = systems.listener(engine)
    systems.prepare(system, model.directory)
    events = read_events()
    if not events:
        return Section(_TITLE, "Skipped: no data set of device events beside this clone.")
    with cluster.database("devices") as url:
        install_listener(url)
        drained = _drain(cluster, url, system, model, events)
        say("devices: looking for neighbours")
        with connect(Settings(database_url=url), "bench") as conn:
            precisions = _precisions(conn, events, drained.texts, sample)
    say("devices: bare encode")
    wait_for_quiet()
    bare = bare_seconds(model.directory, drained.texts, cluster.folder)
    return _section(model, engine, drained, bare, precisions, min(sample, len(events)))


def read_events() -> list[dict[str, str]]:
    """All events in order, a dictionary each; empty where they aren't beside this clone."""
    if not _DATA_SET.exists():
        return []
    with _DATA_SET.open(newline="") as file:
        return list(csv.DictReader(file))


def _drain(
    cluster: Cluster, url: str, system: System, model: Model, events: Sequence[dict[str, str]]
) -> Drained:
    with system.worker(cluster, url, model.directory) as process:
        wait_for_quiet()
        say(f"devices: copying {len(events)} events")
        _copy(url, events)
        committed = time.time()
        batches = process.wait_for_stored(len(events), _PATIENCE_SECONDS)
    require_all_embedded(url)
    return Drained(
        embedded_texts(url),
        batches[-1].seconds - committed,
        _total(batches, "encoded"),
        _total(batches, "reused"),
    )


def _copy(url: str, events: Sequence[dict[str, str]]) -> None:
    with (
        connect(Settings(database_url=url), "bench") as conn,
        conn.cursor() as cursor,
        cursor.copy(_COPY) as rows,
    ):
        for event in events:
            rows.write_row([event[column] for column in _COLUMNS])


def _total(batches: Sequence[Line], name: str) -> int:
    return sum(int(batch.fields[name]) for batch in batches)


def _precisions(
    conn: Connection, events: Sequence[dict[str, str]], texts: Sequence[str], sample: int
) -> tuple[Precision, Precision]:
    """Among all other events, and among the other texts with one event each."""
    # Identity keys count from 1 in the order of the COPY.
    templates = {number: event["template"] for number, event in enumerate(events, start=1)}
    first_with: dict[str, int] = {}
    for number, text in enumerate(texts, start=1):
        first_with.setdefault(text, number)
    itself = {number: number for number in templates}
    by_text = {number: first_with[text] for number, text in enumerate(texts, start=1)}
    chosen = random.Random(4).sample(sorted(templates), min(sample, len(templates)))
    return (
        _precision(conn, _NEAREST_EVENTS, chosen, templates, itself),
        _precision(conn, _NEAREST_TEXTS, chosen, templates, by_text),
    )


def _precision(
    conn: Connection,
    statement: str,
    chosen: Sequence[int],
    templates: dict[int, str],
    candidate_of: dict[int, int],
) -> Precision:
    """`candidate_of`: which candidate stands for each event; it can't be its own neighbour."""
    parameters = {"sample": list(chosen), "neighbours": _NEIGHBOURS}
    pairs = conn.execute(statement.encode(), parameters).fetchall()
    candidates = set(candidate_of.values())
    frequency = Counter(templates[number] for number in candidates)

    def chance(event: int) -> float:
        own = templates[candidate_of[event]] == templates[event]
        return (frequency[templates[event]] - own) / (len(candidates) - 1)

    return Precision(
        mean(templates[event] == templates[neighbour] for event, neighbour in pairs),
        mean(chance(event) for event in chosen),
    )


def _section(
    model: Model,
    engine: str,
    drained: Drained,
    bare: float,
    precisions: tuple[Precision, Precision],
    sample: int,
) -> Section:
    events, distinct = len(drained.texts), len(set(drained.texts))
    among_events, among_texts = precisions
    once = "reached" if drained.encoded == distinct else "missed"
    return Section(
        _TITLE,
        f"{events} log events of real devices, inserted in one COPY while the service sleeps; "
        f"model {model.name}, engine {engine}. Service: from the return of the COPY to the commit "
        "of the last vector. Bare: a process of its own that calls, with torch, "
        f"`SentenceTransformer.encode(texts, batch_size={BATCH_SIZE})` on all texts, repeated "
        f"ones too. Precision at {_NEIGHBOURS}: the share of the nearest other events that come "
        f"from the same log template, mean of {sample} events drawn at random; chance is the share "
        "that neighbours drawn at random would have.",
        ("figure", "value", "baseline", "ratio or difference", "target"),
        (
            ("events with a vector", f"{events}", f"{events} events", "1.00", "all: reached"),
            (
                "texts encoded",
                f"{drained.encoded}",
                f"{distinct} distinct",
                f"{drained.encoded - distinct:+d}",
                f"no text twice: {once}",
            ),
            (
                "seconds to all vectors",
                f"{drained.seconds:.2f}",
                f"{bare:.2f} bare",
                f"{bare / drained.seconds:.3f} times as fast",
                at_least(bare / drained.seconds, _TARGET),
            ),
            _precision_row(f"precision at {_NEIGHBOURS}, all other events", among_events),
            _precision_row(f"precision at {_NEIGHBOURS}, other texts, one each", among_texts),
        ),
        (
            f"reuse alone would allow {events / distinct:.2f} times the bare speed, "
            "if the repeated texts were as long as the rest",
            "events of identical text have identical vectors and share their template; the last "
            "row leaves them out",
        ),
    )


def _precision_row(name: str, precision: Precision) -> tuple[str, ...]:
    times = precision.found / precision.chance
    values = (f"{precision.found:.3f}", f"{precision.chance:.3f} by chance", f"{times:.1f} times")
    return (name, *values, "")
