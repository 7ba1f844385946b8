-- The private schema: what changed, what waits to be embedded, who is embedding, what was installed.
-- Every file here may be run again.

-- "if not exists" would demand the right to create one, although it exists.
do $$
declare
  v_role text;
begin
  if to_regnamespace('listener') is null then
    create schema listener;
    -- What default privileges gave to others.
    for v_role in
      select case when a.grantee = 0 then 'public' else pg_catalog.quote_ident(g.rolname) end
      from pg_catalog.pg_namespace n
      cross join lateral pg_catalog.aclexplode(n.nspacl) a
      left join pg_catalog.pg_roles g on g.oid = a.grantee
      where n.nspname = 'listener' and a.grantee <> n.nspowner
    loop
      execute pg_catalog.format('revoke all on schema listener from %s', v_role);
    end loop;
  end if;
end
$$;

comment on schema listener is
  'iot-event-listener: queue and functions. Private; readers use public.event_embeddings.';

-- What writers leave behind: an event that was inserted or reads differently now. The next claim
-- takes it into the queue. Without a key or an index: a row here is all that a writer pays for, and
-- where everybody only appends no writer waits for another, or for a claim. Not now(), which each
-- insert would have to look up as a function.
create table if not exists listener.change (
  event_id    @key_type@ not null,
  changed_at  timestamptz not null default current_timestamp
);

-- One row per event that waits for its embedding; no row and no change, nothing to do.
--   version   counts how often a change of the event was taken since it was queued, so that a vector
--             of an older text can be told from a current one
--   due_at    not to be claimed before; in a claim it is the end of the lease; infinity is parked
--   lease     the token of the claim that holds the event. Kept when its worker died, so that a
--             row with a lease that is due again is known to have been claimed and never answered
create table if not exists listener.queue (
  event_id   @key_type@ not null,
  due_at     timestamptz not null default now(),
  queued_at  timestamptz not null default now(),
  lease      bigint,
  worker     bigint,
  version    integer not null default 1,
  lane       smallint not null default 0,
  attempts   smallint not null default 0,
  error      text,
  constraint queue_pkey primary key (event_id)
);

comment on column listener.queue.lane is '0 live, 1 backfill; live events are claimed first';

-- The claim walks this index from the oldest due event of each lane. A statement that wants both lanes
-- says `lane in (0, 1)`, or the index would not serve it.
create index if not exists queue_lane_due_at_idx on listener.queue (lane, due_at);

-- listener.change has no key, so a publication for all tables would refuse every delete in it. This makes
-- the log longer under wal_level = logical only. After the index, because a claim locks the queue first.
alter table listener.change replica identity full;

-- Every event that waits to be embedded, and since when. One that is parked is not among them, unless
-- it has changed since.
create or replace view listener.waiting
with (security_invoker = true) as
select w.event_id, min(w.since) as since
from (
  select q.event_id, q.queued_at as since from listener.queue q where q.due_at < 'infinity'
  union all
  select c.event_id, c.changed_at from listener.change c
) w
group by w.event_id;

-- Rows come and go; without this the dead ones pile up until a fifth of a large table is dead.
alter table listener.change set (
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_threshold = 1000
);
alter table listener.queue set (
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_threshold = 1000,
  autovacuum_analyze_scale_factor = 0.1
);

-- What vacuum can't do for as long as anybody holds a snapshot: get rid of the dead rows, which every
-- claim reads again. Empties both tables but for what lives there, if that is little, and only where
-- nobody is in the midst of using them; a writer that comes meanwhile waits for milliseconds.
create or replace function listener.compact()
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_most     constant integer := 2000;
  v_queue    listener.queue[];
  v_changes  listener.change[];
begin
  -- A snapshot from before the lock would not show what its last holder committed.
  if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
    return;
  end if;
  -- A dump, or another reader, that has its snapshot but not yet its locks would find the tables empty.
  begin
    perform from pg_catalog.pg_stat_activity a
    where a.datname = pg_catalog.current_database() and a.application_name = 'pg_dump'
    union all
    select from pg_catalog.pg_locks l
    join pg_catalog.pg_database d on d.oid = l.database
    where d.datname = pg_catalog.current_database()
      and l.mode = 'AccessShareLock'
      and not l.granted;
    if found then
      return;
    end if;
  exception when insufficient_privilege then
    return;
  end;
  -- Looked at before the lock, too: to find under it that too much lives would keep others out for as
  -- long as it takes to read all that is dead.
  if (select count(*) from (select from listener.queue q limit v_most + 1) first) <= v_most then
    begin
      lock table listener.queue in access exclusive mode nowait;
      v_queue := array(select q from listener.queue q limit v_most + 1);
      if pg_catalog.cardinality(v_queue) <= v_most then
        truncate listener.queue;
        insert into listener.queue select * from pg_catalog.unnest(v_queue);
      end if;
    exception when lock_not_available then
      null;
    end;
  end if;
  -- Last, because this one keeps writers out.
  if (select count(*) from (select from listener.change c limit v_most + 1) first) <= v_most then
    begin
      lock table listener.change in access exclusive mode nowait;
      v_changes := array(select c from listener.change c limit v_most + 1);
      if pg_catalog.cardinality(v_changes) <= v_most then
        truncate listener.change;
        insert into listener.change select * from pg_catalog.unnest(v_changes);
      end if;
    exception when lock_not_available then
      null;
    end;
  end if;
end
$$;

revoke all on function listener.compact() from public;

create sequence if not exists listener.lease_token;
create sequence if not exists listener.worker_token;

-- Workers that hold leases. Each also holds an advisory lock of its number for as long as its
-- session lives; a row whose lock is free belongs to a dead worker.
create table if not exists listener.worker (
  worker      bigint not null,
  host        text not null,
  pid         integer not null,
  model       text not null,
  started_at  timestamptz not null default now(),
  seen_at     timestamptz not null default now(),
  constraint worker_pkey primary key (worker)
);

-- Which SQL file was run with which content, so that a second install changes nothing.
create table if not exists listener.applied (
  file        text not null,
  digest      text not null,
  columns     text[],
  applied_at  timestamptz not null default now(),
  constraint applied_pkey primary key (file)
);

-- An event trigger may switch it on for every new table; then no writer could insert here.
do $$
declare
  v_table regclass;
begin
  for v_table in
    select c.oid from pg_catalog.pg_class c
    where c.relnamespace = 'listener'::regnamespace and c.relrowsecurity
  loop
    execute pg_catalog.format('alter table %s disable row level security', v_table);
  end loop;
end
$$;
