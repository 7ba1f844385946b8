"""The plain recipe, what most guides show: `python -m bench.plain_recipe [--batched]`.

A row trigger notifies with the new id; a worker listens, reads the event, encodes it and stores the
vector. Batched by hand, it takes the notifications that are there together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
from pgvector.psycopg import register_vector

from bench import peer_table
from bench.peer_table import (
    BATCH_SIZE,
    BATCHED,
    announce_listening,
    encode,
    load_model,
    worker_url,
)

SCHEMA = """
create function public.notify_plain()
returns trigger
language plpgsql
as $$
begin
  perform pg_notify('plain', new.id::text);
  return new;
end
$$;

create trigger plain_inserted
after insert on public.iot_events
for each row execute function public.notify_plain();
"""

_READ = peer_table.READ.format("%s")
_READ_MANY = peer_table.READ_MANY.format("%s")
_STORE = peer_table.STORE.format("%s", "%s")
_STORE_MANY = peer_table.STORE_MANY.format("%s", "%b")


def install(url: str) -> None:
    """The table of vectors and the trigger."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(peer_table.SCHEMA)
        conn.execute(SCHEMA)


def work(url: str, model_directory: str, in_batches: bool) -> None:
    """Embed each event as its notification arrives, until killed."""
    model = load_model(model_directory)
    with (
        psycopg.connect(url, autocommit=True) as listening,
        psycopg.connect(worker_url(url), autocommit=True) as conn,
    ):
        register_vector(conn)
        listening.execute("listen plain")
        announce_listening()
        if in_batches:
            for event_ids in _what_is_there(listening):
                _embed_together(conn, model, event_ids)
        else:
            for note in listening.notifies():
                _embed(conn, model, int(note.payload))


def _embed(conn: psycopg.Connection[Any], model: Any, event_id: int) -> None:
    row = conn.execute(_READ, (event_id,)).fetchone()
    if row is not None:
        conn.execute(_STORE, (event_id, encode(model, row[0])))


def _what_is_there(listening: psycopg.Connection[Any]) -> Iterator[list[int]]:
    """Wait for a notification, then take along all that have arrived."""
    while True:
        notes = [*listening.notifies(stop_after=1), *listening.notifies(timeout=0)]
        event_ids = [int(note.payload) for note in notes]
        for start in range(0, len(event_ids), BATCH_SIZE):
            yield event_ids[start : start + BATCH_SIZE]


def _embed_together(conn: psycopg.Connection[Any], model: Any, event_ids: list[int]) -> None:
    rows = conn.execute(_READ_MANY, (event_ids,)).fetchall()
    if rows:
        vectors = encode(model, [text for _, text in rows])
        conn.execute(_STORE_MANY, ([event_id for event_id, _ in rows], list(vectors)))


if __name__ == "__main__":
    work(os.environ["DATABASE_URL"], os.environ["EMBEDDING_MODEL"], BATCHED in sys.argv)
