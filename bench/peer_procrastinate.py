"""procrastinate as a user would set it up: `python -m bench.peer_procrastinate [--batched]`.

A row trigger defers a job for each event through the queue's own SQL function. The task reads the
event, encodes it in a thread and stores the vector. procrastinate fetches one job at a time, so
batching by hand is to let many jobs wait for one encode.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import psycopg
from pgvector.psycopg import register_vector_async
from procrastinate import App, PsycopgConnector, SyncPsycopgConnector
from psycopg_pool import AsyncConnectionPool

from bench import peer_table
from bench.collector import Collector, ModelThread
from bench.peer_table import (
    BATCH_SIZE,
    BATCHED,
    announce_listening,
    load_model,
    worker_url,
)

SCHEMA = """
create function public.defer_embedding()
returns trigger
language plpgsql
as $$
begin
  perform procrastinate_defer_jobs_v1(array[
    row('embed', 'embed', 0, null, null, jsonb_build_object('event_id', new.id), null)
      ::procrastinate_job_to_defer_v1
  ]);
  return null;
end
$$;

create trigger embedding_deferred
after insert on public.iot_events
for each row execute function public.defer_embedding();
"""

# Enough that the next event is read while one is encoded.
_CONCURRENCY = 4
_READ = peer_table.READ.format("%s")
_READ_MANY = peer_table.READ_MANY.format("%s")
_STORE = peer_table.STORE.format("%s", "%s")
_STORE_MANY = peer_table.STORE_MANY.format("%s", "%b")


def install(url: str) -> None:
    """The queue's schema, the table of vectors and the trigger."""
    app = App(connector=SyncPsycopgConnector(conninfo=url))
    with app.open():
        app.schema_manager.apply_schema()
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(peer_table.SCHEMA)
        conn.execute(SCHEMA)


class _Embedding:
    """Reads, encodes, stores."""

    def __init__(self, pool: AsyncConnectionPool[Any], model: ModelThread) -> None:
        self._pool = pool
        self._model = model

    async def embed(self, event_id: int) -> None:
        async with self._pool.connection() as conn:
            row = await (await conn.execute(_READ, (event_id,))).fetchone()
        if row is not None:
            vector = await self._model.encode(row[0])
            async with self._pool.connection() as conn:
                await conn.execute(_STORE, (event_id, vector))

    async def embed_all(self, event_ids: list[int]) -> None:
        async with self._pool.connection() as conn:
            rows = await (await conn.execute(_READ_MANY, (event_ids,))).fetchall()
            vectors = await self._model.encode([text for _, text in rows])
            await conn.execute(_STORE_MANY, ([row[0] for row in rows], list(vectors)))


async def work(url: str, model_directory: str, in_batches: bool) -> None:
    """Work until killed. Done jobs are deleted, as their documentation advises for busy queues."""
    model = load_model(model_directory)
    concurrency = 2 * BATCH_SIZE if in_batches else _CONCURRENCY
    url = worker_url(url)
    app = App(connector=PsycopgConnector(conninfo=url, min_size=4, max_size=10))
    pool = AsyncConnectionPool(
        url, min_size=2, max_size=4, kwargs={"autocommit": True}, configure=register_vector_async
    )
    async with pool, app.open_async():
        embedding = _Embedding(pool, ModelThread(model))
        embed = Collector(embedding.embed_all).embed if in_batches else embedding.embed
        app.task(name="embed", queue="embed")(embed)
        announce_listening()
        await app.run_worker_async(
            queues=["embed"], concurrency=concurrency, delete_jobs="successful"
        )


if __name__ == "__main__":
    asyncio.run(
        work(os.environ["DATABASE_URL"], os.environ["EMBEDDING_MODEL"], BATCHED in sys.argv)
    )
