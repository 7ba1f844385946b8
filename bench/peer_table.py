"""What the peers share: where vectors go, what is read, and the model.

Each peer embeds the same column that the listener is told to embed, and stores by upsert.
"""

from __future__ import annotations

import sys
from typing import Any

from psycopg.conninfo import make_conninfo

BATCHED = "--batched"
# In one pass of the model, of the bare encode and of what is batched by hand.
BATCH_SIZE = 64

SCHEMA = """
create extension if not exists vector;

create table public.event_embeddings (
  event_id   bigint not null,
  embedding  vector(384) not null,
  constraint event_embeddings_pkey primary key (event_id),
  constraint event_embeddings_event_id_fkey foreign key (event_id)
    references public.iot_events (id) on delete cascade
);
"""

# {} is the driver's own spelling of a parameter.
READ = "select coalesce(message, '') from public.iot_events where id = {}"
READ_MANY = "select id, coalesce(message, '') from public.iot_events where id = any({})"
STORE = """
insert into public.event_embeddings (event_id, embedding)
values ({}, {})
on conflict (event_id) do update set embedding = excluded.embedding
"""
# Sorted, so that two workers can't deadlock.
STORE_MANY = """
insert into public.event_embeddings (event_id, embedding)
select d.event_id, d.embedding
from unnest({}::bigint[], {}::vector[]) as d (event_id, embedding)
order by d.event_id
on conflict (event_id) do update set embedding = excluded.embedding
"""


def worker_url(url: str) -> str:
    """Commits of the worker don't wait for the disk, as the listener's don't.

    What a crash may undo is done again: a job's end is never on disk before its vector.
    """
    return make_conninfo(url, options="-c synchronous_commit=off")


def load_model(directory: str) -> Any:
    """As a user loads it: the published weights as float32."""
    import torch
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        directory,
        device="cuda" if torch.cuda.is_available() else "cpu",
        local_files_only=True,
        model_kwargs={"use_safetensors": True, "dtype": torch.float32},
    )


def encode(model: Any, texts: str | list[str]) -> Any:
    """One vector, or one for each text."""
    return model.encode(
        texts, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False
    )


def announce_listening() -> None:
    """The line that the benchmark waits for."""
    print("event=listening", file=sys.stderr, flush=True)
