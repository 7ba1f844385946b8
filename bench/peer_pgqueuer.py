"""pgqueuer as a user would set it up: `python -m bench.peer_pgqueuer [--batched]`.

A row trigger calls the function that its documentation gives for enqueueing in SQL. The entrypoint
reads the event, encodes it in a thread and stores the vector. pgqueuer fetches and acknowledges
jobs in batches but hands them out singly, so batching by hand is to let them wait for one encode.
"""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import timedelta
from typing import Any

import asyncpg
import psycopg
from pgqueuer import PgQueuer
from pgqueuer.queries import Queries
from pgvector import Vector
from pgvector.asyncpg import register_vector

from bench import peer_table
from bench.collector import Collector, ModelThread
from bench.peer_table import BATCH_SIZE, BATCHED, announce_listening, load_model

SCHEMA = """
create function public.fn_pgqueuer_enqueue(
  entrypoint     text,
  payload        bytea default null,
  priority       integer default 0,
  execute_after  interval default '0'::interval,
  dedupe_key     text default null,
  headers        jsonb default null
)
returns bigint
language plpgsql
as $$
declare
  v_job_id bigint;
begin
  insert into pgqueuer
    (priority, entrypoint, payload, execute_after, dedupe_key, headers, status)
  values
    (priority, entrypoint, payload, now() + execute_after, dedupe_key, headers, 'queued')
  returning id into v_job_id;

  insert into pgqueuer_log (job_id, status, entrypoint, priority)
  values (v_job_id, 'queued', entrypoint, priority);

  return v_job_id;
end
$$;

create function public.enqueue_embedding()
returns trigger
language plpgsql
as $$
begin
  perform public.fn_pgqueuer_enqueue('embed', convert_to(new.id::text, 'UTF8'));
  return null;
end
$$;

create trigger embedding_enqueued
after insert on public.iot_events
for each row execute function public.enqueue_embedding();
"""

# More than its default of 10, as its documentation advises for jobs of less than a second.
_PLAIN_BATCH_SIZE = 25
# As peer_table.worker_url.
_SESSION = {"synchronous_commit": "off"}
_READ = peer_table.READ.format("$1")
_READ_MANY = peer_table.READ_MANY.format("$1")
_STORE = peer_table.STORE.format("$1", "$2")
_STORE_MANY = peer_table.STORE_MANY.format("$1", "$2")


def install(url: str) -> None:
    """The queue's schema with the autovacuum it recommends, the table of vectors, the trigger."""
    asyncio.run(_install_queue(url))
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(peer_table.SCHEMA)
        conn.execute(SCHEMA)


async def _install_queue(url: str) -> None:
    conn = await asyncpg.connect(url)
    queries = Queries.from_asyncpg_connection(conn)
    await queries.install()
    await queries.optimize_autovacuum()
    await conn.close()


class _Embedding:
    """Reads, encodes, stores."""

    def __init__(self, pool: Any, model: ModelThread) -> None:
        self._pool = pool
        self._model = model

    async def embed(self, event_id: int) -> None:
        row = await self._pool.fetchrow(_READ, event_id)
        if row is not None:
            await self._pool.execute(_STORE, event_id, await self._model.encode(row[0]))

    async def embed_all(self, event_ids: list[int]) -> None:
        rows = await self._pool.fetch(_READ_MANY, event_ids)
        vectors = await self._model.encode([text for _, text in rows])
        # asyncpg would take bare arrays for another dimension of the array.
        wrapped = [Vector(vector) for vector in vectors]
        await self._pool.execute(_STORE_MANY, [row[0] for row in rows], wrapped)


async def work(url: str, model_directory: str, in_batches: bool) -> None:
    """Work until killed, the queue on a connection of its own, as its documentation advises."""
    model = load_model(model_directory)
    size = BATCH_SIZE if in_batches else _PLAIN_BATCH_SIZE
    conn = await asyncpg.connect(url, server_settings=_SESSION)
    async with asyncpg.create_pool(
        url, min_size=2, max_size=4, init=register_vector, server_settings=_SESSION
    ) as pool:
        embedding = _Embedding(pool, ModelThread(model))
        embed = Collector(embedding.embed_all).embed if in_batches else embedding.embed

        async def entrypoint(job: Any) -> None:
            await embed(int(job.payload))

        queue = PgQueuer.from_asyncpg_connection(conn)
        queue.entrypoint("embed")(entrypoint)
        announce_listening()
        await queue.run(
            batch_size=size,
            # The least that it allows: two batches, one in hand and one to come.
            max_concurrent_tasks=2 * size,
            dequeue_timeout=timedelta(seconds=5),
        )


if __name__ == "__main__":
    asyncio.run(
        work(os.environ["DATABASE_URL"], os.environ["EMBEDDING_MODEL"], BATCHED in sys.argv)
    )
