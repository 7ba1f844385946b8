-- What readers use: one unit vector per event, gone with its event.
-- Creating the foreign key locks iot_events against writers until the install commits.

create table if not exists public.event_embeddings (
  event_id      @key_type@ not null,
  embedding     @vector@(384) not null,
  model         text not null,
  content_hash  bytea not null,
  embedded_at   timestamptz not null default now(),
  constraint event_embeddings_pkey primary key (event_id),
  -- on update cascade: a writer that renumbers an event is not refused because of us.
  constraint event_embeddings_event_id_fkey foreign key (event_id)
    references public.iot_events (id) on update cascade on delete cascade
);

comment on table public.event_embeddings is
  'Embedding of each event of iot_events, written by iot-event-listener. Compare vectors of one model only.';
comment on column public.event_embeddings.model is 'name@revision/precision of the model';
comment on column public.event_embeddings.content_hash is 'sha256 of the embedded text, UTF-8';
