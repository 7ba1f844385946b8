"""Real device events: each text encoded once, and neighbours that mean the same."""

from __future__ import annotations

import csv
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from bench.bare_encode import bare_seconds
from bench.cluster import Cluster, install_listener
from bench.drain import require_all_embedded
from bench.processes import REPOSITORY, Line, service
from bench.progress import say
from bench.report import Section
from bench.texts import embedded_texts
from listener.config import Settings
from listener.database import Connection, connect

DATA_SET = REPOSITORY.parent / "shared" / "data" / "device_events.csv"

_TITLE = "Real device events"
_COLUMNS = ("device_id", "event_type", "severity", "message", "created_at")
_COPY = """
copy public.iot_events (device_id, event_type, severity, message, created_at) from stdin
"""
_PATIENCE_SECONDS = 600.0
_NEIGHBOURS = 10

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


def run(cluster: Cluster, model: Path, sample: int) -> Section:
    """One COPY of all events to a service that sleeps; a line instead if the data isn't there."""
    if not DATA_SET.exists():
        return Section(_TITLE, "Skipped: no data set of device events beside this clone.")
    with DATA_SET.open(newline="") as file:
        events = list(csv.DictReader(file))
    templates = {number: event["template"] for number, event in enumerate(events, start=1)}
    with cluster.database("devices") as url:
        install_listener(url)
        drained = _drain(cluster, url, model, events)
        with connect(Settings(database_url=url), "bench") as conn:
            say("devices: looking for neighbours")
            chosen = sorted(random.Random(4).sample(sorted(templates), min(sample, len(events))))
            by_event = _precision(conn, _NEAREST_EVENTS, templates, chosen, templates)
            one_each = {text: number for number, text in _numbered(drained.texts)}
            by_text = _precision(
                conn, _NEAREST_TEXTS, templates, chosen, sorted(one_each.values())
            )
        say("devices: bare encode")
        bare = bare_seconds(model, drained.texts, cluster.folder)
    return _section(model, drained, bare, by_event, by_text, len(chosen))


def _drain(
    cluster: Cluster, url: str, model: Path, events: Sequence[dict[str, str]]
) -> Drained:
    with service(cluster, url, model) as process:
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
