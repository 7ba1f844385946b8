"""Reading: nearest events, and one event's whole story."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import class_row

from listener import queries
from listener.claim import EventId, Vector
from listener.database import Connection, reading
from listener.errors import SchemaError


@dataclass(frozen=True)
class Hit:
    """An event found by meaning; similarity is the cosine, 1 is the same.

    `text` None: embedding_input fails on it.
    """

    event_id: EventId
    similarity: float
    text: str | None

    @property
    def line(self) -> str:
        """The text in one line."""
        return " · ".join(readable(self.text).splitlines())


@dataclass(frozen=True)
class EventState:
    """What is known of one event. `embedding` None: it has none.

    `input` None: embedding_input fails on it.
    """

    event_id: EventId
    input: str | None
    model: str | None
    is_current: bool | None
    embedded_at: datetime | None
    embedding: Any
    pending: bool
    parked: bool
    attempts: int | None
    leased: bool
    error: str | None


def readable(text: str | None) -> str:
    """A text as it is shown to people."""
    return "(none: embedding_input fails on it)" if text is None else text


def nearest(conn: Connection, vector: Vector, model: str, limit: int) -> list[Hit]:
    """The events nearest to a unit vector, best first, among those of the same model.

    Raises SchemaError if the database has no vectors.
    """
    parameters = {"embedding": vector, "model": model, "limit": limit}
    try:
        with reading(conn):
            rows = conn.execute(queries.NEAREST, parameters).fetchall()
    except psycopg.ProgrammingError as error:
        if error.sqlstate is not None:
            raise
        # The driver's own error: there was no such type when it connected.
        raise SchemaError("the database has no pgvector; run `listener install`") from error
    return [Hit(*row) for row in rows]


def describe(conn: Connection, event_id: str) -> EventState | None:
    """Everything about one event, or None if there is no such event.

    Raises psycopg.DataError if the id isn't of the key's type.
    """
    with reading(conn), conn.cursor(row_factory=class_row(EventState)) as cursor:
        return cursor.execute(queries.DESCRIBE, {"event_id": event_id}).fetchone()
