"""Real device log events, real weights."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from listener.config import Settings
from tests.harness import Database, listener

SAMPLE = 500
NEIGHBOURS = 10


def test_every_device_event_gets_a_vector_and_no_text_is_encoded_twice(
    static: Database, device_events: list[dict[str, str]]
) -> None:
    """All 6,000 in one COPY."""
    copy_in(static, device_events)

    finished = listener(static.settings, "run", "--once")

    distinct = static.value(
        "select count(distinct listener.embedding_input(e)) from public.iot_events e"
    )
    encoded = [field for field in finished.stderr.split() if field.startswith("encoded=")]
    assert len(static.embedded()) == len(device_events)
    assert sum(int(field.partition("=")[2]) for field in encoded) == distinct


def test_neighbours_of_a_device_event_are_of_its_kind(
    database: Database, converted: Settings, device_events: list[dict[str, str]]
) -> None:
    """Vectors that are near share the event's template far more often than chance."""
    events = device_events[:2000]
    copy_in(database, events)
    settings = replace(
        database.settings,
        embedding_model=converted.embedding_model,
        model_cache=converted.model_cache,
    )

    listener(settings, "run", "--once")

    precision, chance = precision_at_10(database, events)
    assert precision > 3 * chance


def copy_in(database: Database, events: list[dict[str, str]]) -> None:
    columns = ("device_id", "event_type", "severity", "message", "created_at")
    copy = f"copy public.iot_events ({', '.join(columns)}) from stdin"
    with database.conn.cursor() as cursor, cursor.copy(copy.encode()) as rows:
        for event in events:
            rows.write_row([event[column] for column in columns])


def precision_at_10(database: Database, events: list[dict[str, str]]) -> tuple[float, float]:
    """The share of the 10 nearest events of other text that have the event's template; and by
    chance."""
    stored = database.embedded()
    vectors = np.stack([stored[event_id] for event_id in sorted(stored)])
    templates = np.array([event["template"] for event in events])
    texts = np.array([event["message"] for event in events])
    hits = []
    for number in random.Random(1).sample(range(len(events)), SAMPLE):  # noqa: S311  a fixed sample
        similarity = vectors @ vectors[number]
        similarity[texts == texts[number]] = -2
        nearest = np.argsort(-similarity)[:NEIGHBOURS]
        hits.append(np.mean(templates[nearest] == templates[number]))
    _, counts = np.unique(templates, return_counts=True)
    return float(np.mean(hits)), float(np.sum((counts / len(events)) ** 2))
