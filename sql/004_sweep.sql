-- What the service and the commands read: events, their texts, the embeddings, pages of both in the
-- order of "the newest"; and the sweep.

-- sha256 of an event's text; null where embedding_input raises, so that one such event stops no
-- sweep: it is queued, and parked by the worker with the reason.
create or replace function listener.content_hash(p_event public.iot_events)
returns bytea
language plpgsql
stable
set search_path = ''
as $$
begin
  return pg_catalog.sha256(pg_catalog.convert_to(
    coalesce(listener.embedding_input(p_event), ''), 'UTF8'
  ));
-- `others` is all but a failed assertion and a cancelled statement.
exception when others or assert_failure then
  return null;
end
$$;

-- embedding_input, as stable. One whose author didn't say so counts as volatile, and a view with it
-- would compute the text of every event there is, whichever was asked for.
create or replace function listener.input_of(p_event public.iot_events)
returns text
language plpgsql
stable
set search_path = ''
as $$
begin
  return listener.embedding_input(p_event);
end
$$;

-- What the service sees of the two tables in public, with the rights of the role that installed: an
-- event's id, text and the text's hash, and the vectors. So the worker has no right on the tables
-- themselves, sees no column that isn't embedded, and row-level security, which is about readers, hides
-- no event from it. A hidden event would pass for deleted. `e.*` is the row; a bare `e` would
-- be a column of that name, where there is one.
create or replace view listener.event as
select
  e.id,
  listener.input_of(e.*) as input,
  listener.content_hash(e.*) as content_hash
from public.iot_events e;

-- Drop these functions of a former iot_events, another table that had the name.
do $$
declare
  v_function regprocedure;
begin
  for v_function in
    select p.oid
    from pg_catalog.pg_proc p
    where p.pronamespace = 'listener'::regnamespace
      and p.proname in ('embedding_input', 'content_hash', 'input_of')
      and p.proargtypes[0] <> (
        select c.reltype from pg_catalog.pg_class c where c.oid = 'public.iot_events'::regclass
      )
  loop
    execute pg_catalog.format('drop function %s', v_function);
  end loop;
end
$$;

create or replace view listener.embedding as
select m.event_id, m.embedding, m.model, m.content_hash, m.embedded_at
from public.event_embeddings m;

-- One page of events, newest first, from a position (null: the newest) on, and whether each has an
-- embedding of its current text by p_model. The text, which may take long or fail, is computed only
-- where the answer can be yes: for an event that has an embedding by p_model and is not queued. The row
-- after the page gives the position of the next one. By anti-join on pages, never by "id > watermark":
-- ids commit out of order.
-- Security definer, because the order is that of columns which listener.event doesn't show.
-- Its first statement, v_from, locks iot_events before event_embeddings, as a truncate cascade of a
-- writer does; in another order the two could end in a deadlock.
create or replace function listener.page(
  p_model  text,
  p_from   text,
  p_limit  integer,
  p_since  timestamptz
)
returns table (event_id @key_type@, is_current boolean, place integer, next_from text)
language plpgsql
stable
security definer
set search_path = ''
as $$
#variable_conflict use_variable
-- A column of iot_events may have the name of a parameter; each is written with its table.
declare
  v_from pg_catalog.jsonb := coalesce(
    p_from::pg_catalog.jsonb,
    (select @position@ from public.iot_events e order by @newest_first@ limit 1)
  );
begin
  -- created_at was not null at the install and is null in some by now, which have no place in the order.
  if v_from ->> 0 is null and v_from is not null then
    raise undefined_column using message = 'events are ordered by created_at, and it is null in some';
  end if;
  if p_since is not null and not @has_time@ then
    raise undefined_column using message = 'iot_events had no created_at when this was installed';
  end if;
  return query
  with page as materialized (
    select
      e.id as event_id,
      @position@ as position,
      (row_number() over newest_first)::integer as place
    from public.iot_events e
    where @from_position@
      and @in_time@
    window newest_first as (order by @newest_first@)
    order by @newest_first@
    limit p_limit + 1
  )
  select
    p.event_id,
    coalesce(
      (
        select m.content_hash = (
          select listener.content_hash(e.*) from public.iot_events e where e.id = m.event_id
        )
        from public.event_embeddings m
        where m.event_id = p.event_id @key_collation@
          and m.model = p_model
          and not exists (select from listener.queue q where q.event_id = m.event_id)
      ),
      false
    ),
    p.place,
    (select beyond.position::pg_catalog.text from page beyond where beyond.place = p_limit + 1)
  from page p
  where p.place <= p_limit;
end
$$;

-- Queue the events of one page whose embedding is missing, of another text or of another model; where
-- p_model is null, all of them. Returns how many it looked at, how many it queued, and where the next
-- page begins (null: the end). Run again with nothing changed, it writes nothing.
create or replace function listener.sweep(
  p_model  text,
  p_from   text,
  p_limit  integer,
  p_since  timestamptz
)
returns table (scanned bigint, queued bigint, next_from text)
language plpgsql
volatile
set search_path = ''
as $$
begin
  return query
  with page as materialized (
    select * from listener.page(p_model, p_from, p_limit, p_since)
  ), lacking as materialized (
    select
      p.event_id,
      -- In the past and in the order of the page, so that the newest is claimed first; also once it
      -- is given back.
      now() - (p_limit - p.place) * interval '1 microsecond' as place_in_line
    from page p
    left join listener.queue q on q.event_id = p.event_id
    -- In the same snapshot: with on conflict alone, an event that a worker acknowledged in the
    -- meantime would be queued again.
    where not p.is_current
      and q.event_id is null
      and not exists (select from listener.change c where c.event_id = p.event_id)
  ), added as (
    insert into listener.queue (event_id, lane, due_at, queued_at)
    select l.event_id, 1, l.place_in_line, l.place_in_line
    from lacking l
    -- As a claim takes changes, so that the two can't deadlock.
    order by l.event_id
    on conflict (event_id) do nothing
    returning 1
  )
  select
    (select count(*) from page),
    (select count(*) from added),
    (select p.next_from from page p limit 1);
end
$$;

-- Of the newest p_last events: how many there are, and how many have a current embedding; one that is
-- queued does not count as such.
create or replace function listener.coverage(p_model text, p_last integer)
returns table (events bigint, current bigint)
language plpgsql
stable
set search_path = ''
as $$
begin
  return query
  select count(*), count(*) filter (where p.is_current)
  from listener.page(p_model, null, p_last, null) p;
end
$$;

-- Everything known about one event; `input` is null where embedding_input raises. No row: there is
-- no such event.
create or replace function listener.describe(p_id text)
returns table (
  event_id     @key_type@,
  input        text,
  model        text,
  is_current   boolean,
  embedded_at  timestamptz,
  embedding    @vector@,
  pending      boolean,
  parked       boolean,
  attempts     smallint,
  leased       boolean,
  error        text
)
language sql
stable
set search_path = ''
as $$
  select
    e.id,
    case when e.content_hash is not null then coalesce(e.input, '') end,
    m.model,
    m.content_hash = e.content_hash,
    m.embedded_at,
    m.embedding,
    w.has_changed or coalesce(q.due_at < 'infinity', false),
    not w.has_changed and coalesce(q.due_at = 'infinity', false),
    q.attempts,
    q.lease is not null and q.due_at > now(),
    q.error
  from (select p_id::@key_type@ as id) asked
  join listener.event e on e.id = asked.id
  -- Not by e.id: an id of another collation than the default finds no index of ours.
  left join listener.embedding m on m.event_id = asked.id
  left join listener.queue q on q.event_id = asked.id
  cross join lateral (
    select exists (
      select from listener.change c where c.event_id = asked.id
    ) as has_changed
  ) w
$$;

-- The p_limit events nearest to a vector by cosine, among those of one model; `input` as above.
-- Security definer, because its operator is in a schema that may be closed to the worker, as
-- `extensions` is on Supabase.
create or replace function listener.nearest(
  p_embedding  @vector@,
  p_model      text,
  p_limit      integer
)
returns table (event_id @key_type@, similarity double precision, input text)
language sql
stable
security definer
set search_path = ''
as $$
  with hits as materialized (
    select m.event_id, m.embedding operator(@vector_schema@.<=>) p_embedding as distance
    from public.event_embeddings m
    where m.model = p_model
    order by m.embedding operator(@vector_schema@.<=>) p_embedding
    limit p_limit
  )
  select
    h.event_id,
    1 - h.distance,
    case
      when listener.content_hash(e.*) is not null then coalesce(listener.embedding_input(e.*), '')
    end
  from hits h
  join public.iot_events e on e.id = h.event_id
  order by h.distance
$$;

-- Seconds from created_at to the vector, of the newest p_last events. For an iot_events that has the
-- column; in plpgsql, so that the column may be altered or dropped. Security definer, because listener.event
-- doesn't show it.
create or replace function listener.latency(p_last integer)
returns setof double precision
language plpgsql
stable
security definer
set search_path = ''
as $$
#variable_conflict use_variable
begin
  return query
  select extract(epoch from m.embedded_at - e.created_at)::double precision
  from listener.page(null, null, p_last, null) p
  join public.iot_events e on e.id = p.event_id
  join public.event_embeddings m on m.event_id = p.event_id
  where pg_catalog.isfinite(e.created_at);
end
$$;

revoke all on function listener.embedding_input(public.iot_events) from public;
revoke all on function listener.input_of(public.iot_events) from public;
revoke all on function listener.latency(integer) from public;
revoke all on function listener.content_hash(public.iot_events) from public;
revoke all on function listener.page(text, text, integer, timestamptz) from public;
revoke all on function listener.sweep(text, text, integer, timestamptz) from public;
revoke all on function listener.coverage(text, integer) from public;
revoke all on function listener.describe(text) from public;
revoke all on function listener.nearest(@vector@, text, integer) from public;
