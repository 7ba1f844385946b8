"""Ways to store vectors without a queue: arrays, COPY through a temporary table, a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from listener.database import Connection

FENCED = "fenced write"

# (event_id, embedding, model, content_hash)
Row = tuple[int, Any, str, bytes]

_TEMPORARY = """
create temporary table incoming (
  event_id      bigint not null,
  embedding     public.vector(384) not null,
  model         text not null,
  content_hash  bytea not null
) on commit delete rows
"""
_ON_CONFLICT = """
on conflict (event_id) do update set
  embedding = excluded.embedding,
  model = excluded.model,
  content_hash = excluded.content_hash,
  embedded_at = excluded.embedded_at
"""
_INSERT = "insert into public.event_embeddings (event_id, embedding, model, content_hash)"
_UNNEST = f"""
{_INSERT}
select d.event_id, d.embedding, d.model, d.content_hash
from unnest(%s::bigint[], %b::public.vector[], %s::text[], %b::bytea[])
  as d (event_id, embedding, model, content_hash)
order by d.event_id
{_ON_CONFLICT}
"""
_FROM_TEMPORARY = f"""
{_INSERT}
select i.event_id, i.embedding, i.model, i.content_hash
from incoming i
order by i.event_id
{_ON_CONFLICT}
"""
_ONE = f"{_INSERT} values (%s, %b, %s, %b) {_ON_CONFLICT}"
_COPY = "copy incoming (event_id, embedding, model, content_hash) from stdin (format binary)"


def prepare_ways(conn: Connection) -> None:
    """What a session makes once."""
    conn.execute(_TEMPORARY)


def _store_arrays(conn: Connection, rows: Sequence[Row]) -> None:
    event_ids, vectors, models, hashes = (list(column) for column in zip(*rows, strict=True))
    conn.execute(_UNNEST.encode(), (event_ids, vectors, models, hashes))


def _store_by_copy(conn: Connection, rows: Sequence[Row]) -> None:
    with conn.transaction(), conn.cursor() as cursor:
        with cursor.copy(_COPY) as copy:
            copy.set_types(["int8", "vector", "text", "bytea"])
            for row in rows:
                copy.write_row(row)
        cursor.execute(_FROM_TEMPORARY.encode())


def _store_in_pipeline(conn: Connection, rows: Sequence[Row]) -> None:
    # executemany sends all before it reads the first answer.
    with conn.transaction(), conn.cursor() as cursor:
        cursor.executemany(_ONE.encode(), rows)


WAYS: dict[str, Callable[[Connection, Sequence[Row]], None]] = {
    "arrays, no fence": _store_arrays,
    "COPY to a temporary table": _store_by_copy,
    "executemany, pipeline": _store_in_pipeline,
}
