"""What the harness adds to the database: a text that fails, and a log of texts and of vectors."""

from __future__ import annotations

from listener.template import sql_text

EVENTS = sql_text("demo.sql")

# What `listener install` makes, but for events that carry the marker. Not 1 / 0: the planner would
# compute a constant at once, for every event.
_EMBEDDING_INPUT = """
create or replace function listener.embedding_input(event public.iot_events)
returns text
language sql
stable
set search_path = ''
as $$
  select case
    when strpos(event.message, 'poison') > 0 then (length(event.message) / 0)::text
    else concat_ws(
      E'\\n',
      'event_type: ' || nullif(event.event_type, ''),
      'severity: ' || nullif(event.severity, ''),
      'message: ' || nullif(event.message, '')
    )
  end
$$
"""

# text:     each text that an event ever had, numbered in the order in which it had them
# embedded: each vector that was written, numbered likewise, by the hash of its text
# unseen:   events changed behind the triggers, which only a sweep can find
_TABLES = """
create schema soak;
create sequence soak.moment;
create sequence soak.reading;
create table soak.text (
  event_id      bigint not null,
  content_hash  bytea not null,
  moment        bigint not null default nextval('soak.moment'),
  constraint text_pkey primary key (event_id, content_hash)
);
create table soak.embedded (
  moment        bigint not null default nextval('soak.moment'),
  event_id      bigint not null,
  content_hash  bytea not null,
  embedded_at   timestamptz not null default clock_timestamp()
);
create index embedded_event_id_idx on soak.embedded (event_id, moment);
create table soak.unseen (
  event_id  bigint not null,
  constraint unseen_pkey primary key (event_id)
);
"""

# No text comes twice to an event, but with the event itself: deleted and inserted again as it was.
_FUNCTIONS = """
create function soak.message()
returns text
language sql
volatile
as $$
  select format(
    '%s %s %s, reading #%s',
    (array['pump', 'valve', 'boiler', 'gate', 'fan'])[1 + r % 5],
    r % 97,
    (array[
      'reports a temperature of 71 degrees', 'is stuck', 'lost its link', 'ist zu heiß',
      'restarted after a power cut', 'vibrates more than it should 🔧', 'is back to normal'
    ])[1 + r % 7],
    lpad(r::text, 9, '0')
  )
  from nextval('soak.reading') r
$$;

create function soak.log_texts()
returns trigger
language plpgsql
as $$
begin
  insert into soak.text (event_id, content_hash)
  select n.id, sha256(convert_to(coalesce(listener.embedding_input(n.*), ''), 'UTF8'))
  from new_events n
  where strpos(coalesce(n.message, ''), 'poison') = 0
  on conflict do nothing;
  return null;
end
$$;

create function soak.log_embedded()
returns trigger
language plpgsql
as $$
begin
  insert into soak.embedded (event_id, content_hash)
  select n.event_id, n.content_hash from new_vectors n;
  return null;
end
$$;
"""

_TRIGGERS = """
create trigger soak_inserted after insert on public.iot_events
referencing new table as new_events for each statement execute function soak.log_texts();
create trigger soak_updated after update on public.iot_events
referencing new table as new_events for each statement execute function soak.log_texts();
create trigger soak_inserted after insert on public.event_embeddings
referencing new table as new_vectors for each statement execute function soak.log_embedded();
create trigger soak_updated after update on public.event_embeddings
referencing new table as new_vectors for each statement execute function soak.log_embedded();
"""

HARNESS = tuple(
    statement.encode() for statement in (_EMBEDDING_INPUT, _TABLES, _FUNCTIONS, _TRIGGERS)
)
