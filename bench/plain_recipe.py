"""The plain recipe, which the writers' benchmark compares with: what most guides show.

A row trigger notifies with the new id; a worker listens, reads the event, encodes it and inserts
the vector. `python -m bench.plain_recipe` is the worker.
"""

from __future__ import annotations

import os
import sys

import psycopg
from pgvector.psycopg import register_vector

SCHEMA = """
create extension vector;

create table public.event_embeddings (
  event_id   bigint not null,
  embedding  vector(384) not null,
  constraint event_embeddings_pkey primary key (event_id),
  constraint event_embeddings_event_id_fkey foreign key (event_id)
    references public.iot_events (id) on delete cascade
);

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

_READ = """
select concat_ws(E'\\n', event_type, severity, message)
from public.iot_events
where id = %s
"""

_STORE = "insert into public.event_embeddings (event_id, embedding) values (%s, %s)"


def work(url: str, model_directory: str) -> None:
    """Embed each event as its notification arrives, until killed."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_directory, device="cpu", local_files_only=True)
    with (
        psycopg.connect(url, autocommit=True) as listening,
        psycopg.connect(url, autocommit=True) as conn,
    ):
        register_vector(conn)
        listening.execute("listen plain")
        print("event=listening", file=sys.stderr, flush=True)
        for note in listening.notifies():
            row = conn.execute(_READ, (int(note.payload),)).fetchone()
            if row is not None:
                vector = model.encode(row[0], show_progress_bar=False)
                conn.execute(_STORE, (int(note.payload), vector))


if __name__ == "__main__":
    work(os.environ["DATABASE_URL"], os.environ["EMBEDDING_MODEL"])
