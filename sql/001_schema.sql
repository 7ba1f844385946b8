-- The private schema: what waits to be embedded, who is embedding, and what was installed.
-- Every file here may be run again.

create schema if not exists listener;

comment on schema listener is
  'iot-event-listener: queue and functions. Private; readers use public.event_embeddings.';

-- One row per event that waits for its embedding; no row, nothing to do.
--   version   counts the changes since the event was queued, so that a vector of an older text
--             can be told from a current one
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
  -- No check constraints: each is parsed anew in every insert, and that alone took a tenth of the
  -- writers' throughput.
  constraint queue_pkey primary key (event_id)
);

comment on column listener.queue.lane is '0 live, 1 backfill; live events are claimed first';

-- The claim walks this index from the oldest due event of each lane.
create index if not exists queue_lane_due_at_idx on listener.queue (lane, due_at);

-- Rows come and go; without this the dead ones pile up until a fifth of a large table is dead.
alter table listener.queue set (
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_threshold = 1000,
  autovacuum_analyze_scale_factor = 0.1
);

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
