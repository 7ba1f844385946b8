-- How it stands, for whoever can't scrape: `listener status` and the metrics read the same views. A
-- role that watches needs usage on the schema and select on the view, nothing else.

-- The workers whose session lives: they hold the lock of their number.
create or replace view listener.live_worker as
select w.worker, w.host, w.pid, w.model, w.started_at, w.seen_at
from listener.worker w
where exists (
  select from pg_catalog.pg_locks l
  join pg_catalog.pg_database d on d.oid = l.database
  where d.datname = pg_catalog.current_database()
    and l.locktype = 'advisory'
    and l.granted
    and l.classid = @worker_lock_class@
    and l.objid = w.worker
);

-- One row. The events themselves are not looked at; of the embeddings at most 100,000 are counted,
-- beyond that the planner's estimate serves, so that this costs the same on a table of any size.
-- What grows with the backlog is the reading of the queue. A column that isn't asked for costs
-- nothing.
create or replace view listener.status as
with counted as materialized (
  select count(*) as embeddings
  from (select from public.event_embeddings limit 100001) first
), changed as materialized (
  select c.event_id, min(c.changed_at) as since
  from listener.change c
  group by c.event_id
), live as materialized (
  select count(*) as events, min(w.since) as oldest
  from (
    select c.since from changed c
    union all
    select q.queued_at
    from listener.queue q
    where q.lane = 0
      and q.due_at < 'infinity'
      and not exists (select from changed c where c.event_id = q.event_id)
  ) w
), backfill as materialized (
  select count(*) as events, min(q.queued_at) as oldest
  from listener.queue q
  where q.lane = 1
    and q.due_at < 'infinity'
    and not exists (select from changed c where c.event_id = q.event_id)
)
select
  case
    when (select c.embeddings from counted c) <= 100000 then (select c.embeddings from counted c)
    else (
      select greatest(e.reltuples::bigint, 100001)
      from pg_catalog.pg_class e
      where e.oid = 'public.event_embeddings'::regclass
    )
  end as embedded,
  (select c.embeddings from counted c) > 100000 as embedded_is_estimate,
  l.events + b.events as pending,
  l.events as pending_live,
  b.events as pending_backfill,
  extract(epoch from now() - least(l.oldest, b.oldest))::float8 as oldest_pending_seconds,
  extract(epoch from now() - l.oldest)::float8 as oldest_live_seconds,
  extract(epoch from now() - b.oldest)::float8 as oldest_backfill_seconds,
  (
    select count(*)
    from listener.queue q
    where q.lane in (0, 1)
      and q.due_at = 'infinity'
      and not exists (select from changed c where c.event_id = q.event_id)
  ) as parked,
  (select count(*) from listener.live_worker) as workers,
  (
    select q.error
    from listener.queue q
    where q.error is not null
    order by q.due_at = 'infinity', q.due_at desc, q.queued_at desc
    limit 1
  ) as last_error
from live l
cross join backfill b;

comment on view listener.status is
  'How the listener stands, in one row; oldest_… is null where nothing waits.';
comment on column listener.status.embedded is 'Exact up to 100,000, an estimate beyond.';
comment on column listener.status.pending_live is
  'Events that wait because they are new or changed; claimed before those of a backfill.';
comment on column listener.status.parked is 'Events that failed for the last time.';
comment on column listener.status.last_error is
  'Of the events that are to be tried again; where there are none, of the parked ones.';
