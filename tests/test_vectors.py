"""The vector type on a connection."""

from __future__ import annotations

from pgvector.psycopg.vector import VectorDumper

from listener import vectors
from tests.harness import Database


def test_another_connection_gives_the_driver_no_class_to_keep(database: Database) -> None:
    """It keeps each one for good, and a service connects at every scrape."""
    before = classes()
    assert before

    for _ in range(3):
        with database.session() as conn:
            assert conn.execute("select '[1]'::vector").fetchone() is not None

    assert classes() == before


def classes() -> set[type]:
    """Those of one vector and of many."""
    below = VectorDumper.__subclasses__()
    return {*below, *(c for b in below for c in b.__subclasses__())} | {
        *vectors._VectorsDumper.__subclasses__()
    }
