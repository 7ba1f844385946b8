"""The statements of the service and of the commands that read or queue; values as parameters only.

All times are the database's clock. `event_id` comes and goes as the Python type of its key.
"""

from __future__ import annotations

# --- connections -------------------------------------------------------------------------------

# By extension, not by name: the schema may be closed to the worker.
VECTOR_TYPE = """
select t.typname, t.oid, t.typarray
from pg_catalog.pg_extension x
join pg_catalog.pg_type t on t.typnamespace = x.extnamespace and t.typname = 'vector'
where x.extname = 'vector'
"""

# An operator has no schema where it is used. One that somebody made in public, for the very types
# that Postgres would convert, would be taken for its own, and run with the rights of who asks. What
# runs in a pooler's session, where no path can be set, has the types of an operator of Postgres.
PIN_PATH = "set local search_path = ''"

# For the two sessions of the service, and no pooler's. A statement that waits for a lock, as behind
# an index build, is given up by the server, so that no abandoned ones pile up there; sooner than a
# slow one, which can be an event's fault, as a lock never is. The server finds a dead client in
# 19 s instead of two hours, and with it frees the locks of a worker.
SERVICE_SESSION = """
select
  pg_catalog.set_config('search_path', '', false),
  pg_catalog.set_config('statement_timeout', '8s', false),
  pg_catalog.set_config('lock_timeout', '6s', false),
  -- A sleep of the service is no idleness.
  pg_catalog.set_config('idle_session_timeout', '0', false),
  -- Under a stricter default every claim that meets another would fail.
  pg_catalog.set_config('default_transaction_isolation', 'read committed', false),
  pg_catalog.set_config('tcp_keepalives_idle', '10', false),
  pg_catalog.set_config('tcp_keepalives_interval', '3', false),
  pg_catalog.set_config('tcp_keepalives_count', '3', false),
  -- While an answer is on its way to a dead client, keepalives are silent.
  pg_catalog.set_config('tcp_user_timeout', '19000', false),
  -- Everything goes by a key. A plan from when a table was empty, also that of the foreign key's
  -- check, would else read it whole for each event until the next analyze.
  pg_catalog.set_config('enable_seqscan', 'off', false),
  -- Before PostgreSQL 18 the few plans left that read a small table whole would now be compiled.
  pg_catalog.set_config('jit', 'off', false),
  -- Since PostgreSQL 17; it would end the session.
  (
    select pg_catalog.set_config(s.name, '0', false)
    from pg_catalog.pg_settings s
    where s.name = 'transaction_timeout'
  ),
  -- A commit of ours that a crash undoes takes vector and acknowledgement back together, so the
  -- event is pending again: nothing is lost by not waiting for the disk.
  pg_catalog.set_config('synchronous_commit', 'off', false)
"""

# --- wake-up -----------------------------------------------------------------------------------

LISTEN = "listen listener"
LISTEN_HELP = "listen listener_help"
UNLISTEN_HELP = "unlisten listener_help"
LISTEN_PROBE = "listen listener_probe"
UNLISTEN_PROBE = "unlisten listener_probe"
# A full NOTIFY queue would fail the statement; what a hint would have told is found by polling.
NOTIFY = """
select pg_catalog.pg_notify(%(channel)s, %(payload)s)
where pg_catalog.pg_notification_queue_usage() < 0.5::float8
"""
BACKEND = "select pg_catalog.pg_backend_pid()"
TRY_LOCK = "select pg_catalog.pg_try_advisory_lock(%(key)s)"
UNLOCK = "select pg_catalog.pg_advisory_unlock(%(key)s)"

# --- workers -----------------------------------------------------------------------------------

# The lock comes before the row, so that a registered worker is never seen without its lock.
NEW_WORKER = """
select n.worker, pg_catalog.pg_try_advisory_lock(%(lock_class)s, n.worker::integer) as is_locked
from pg_catalog.nextval('listener.worker_token') as n (worker)
"""
REGISTER_WORKER = """
insert into listener.worker (worker, host, pid, model)
values (%(worker)s, %(host)s, %(pid)s, %(model)s)
"""
SEE_WORKER = "update listener.worker set seen_at = now() where worker = %(worker)s"
UNLOCK_WORKER = "select pg_catalog.pg_advisory_unlock(%(lock_class)s, %(worker)s::integer)"
FORGET_WORKER = "delete from listener.worker where worker = %(worker)s"

# A free lock means a dead session. Its events keep their lease, which marks them as claimed and
# never answered, and go back to the place in line that they had. After a second attempt they go to
# its end: at the front an innocent one would be in hand at every death that follows.
#
# Also asks whether a queued event is due (a retry, an ended lease, one that a writer held), of
# which no NOTIFY tells. Changes are not looked for: their writers wake us. And whether there are,
# by the server's statistics, so many dead rows that each claim feels them.
BEAT = """
with dead as materialized (
  select w.worker
  from listener.worker w
  where w.worker <> %(worker)s::bigint
    and pg_catalog.pg_try_advisory_xact_lock(%(lock_class)s, w.worker::integer)
), theirs as materialized (
  select q.event_id, q.worker
  from listener.queue q
  where q.lane in (0, 1)
    and q.due_at > now()
    and q.due_at < 'infinity'
    and q.worker in (select d.worker from dead d)
    -- Without this, every beat would read all leased rows.
    and exists (select from dead)
), held as materialized (
  select q.event_id
  from listener.queue q
  where q.event_id in (select t.event_id from theirs t)
    and q.worker in (select d.worker from dead d)
  for update skip locked
), released as (
  update listener.queue q
  set
    due_at = case when q.attempts > 1 then now() else least(q.queued_at, now()) end,
    worker = null
  from held h
  where q.event_id = h.event_id
  returning 1
), forgotten as (
  -- Not while a peer takes over an event of theirs: it may yet fail.
  delete from listener.worker w
  using dead d
  where w.worker = d.worker
    and not exists (
      select from theirs t
      where t.worker = d.worker and t.event_id not in (select h.event_id from held h)
    )
)
select exists (select from released) or exists (
  select from listener.queue q
  where q.lane in (0, 1)
    and q.due_at <= now()
) as is_due,
greatest(
  pg_catalog.pg_stat_get_dead_tuples('listener.queue'::pg_catalog.regclass),
  pg_catalog.pg_stat_get_dead_tuples('listener.change'::pg_catalog.regclass)
) > 4000 as has_many_dead
"""

COMPACT = "select listener.compact()"

# --- queue -------------------------------------------------------------------------------------

# A commit that waits for the disk, though the session's don't.
_DURABLY = """\
  pg_catalog.set_config(
    'synchronous_commit',
    pg_catalog.replace(pg_catalog.current_setting('synchronous_commit'), 'off', 'local'),
    true
  )"""

# Take up to `events` changes into the queue, leased at once. From `position` (a ctid) on, or each
# claim would read again what was deleted before it and is not vacuumed yet. An event that is queued
# already starts anew; new lease and version fence out its holder. But one that was claimed and
# never answered is left to CLAIM, or a text that kills, and changes before the next worker is
# there, would never be found. In the order of the key, so that two workers that take changes of the
# same events can't deadlock.
_TAKE = """
with taken as (
  delete from listener.change c
  where c.ctid = any(array(
    select f.ctid
    from listener.change f
    where f.ctid >= %(position)s::tid
    limit %(events)s
    for update skip locked
  ))
  returning c.event_id, c.changed_at, c.ctid as place
), token as materialized (
  select pg_catalog.nextval('listener.lease_token') as lease where exists (select from taken)
)
insert into listener.queue as q (event_id, queued_at, due_at, lease, worker, attempts)
select
  t.event_id,
  min(t.changed_at),
  now() + %(lease_seconds)s * interval '1 second',
  k.lease,
  %(worker)s::bigint,
  1
from taken t
cross join token k
group by t.event_id, k.lease
order by t.event_id
on conflict (event_id) do update set
  version = q.version + 1,
  lane = 0,
  -- One that waited for a backfill, or was parked, waits for its change from now on.
  queued_at = case
    when q.lane = 0 and q.due_at < 'infinity' then q.queued_at
    else excluded.queued_at
  end,
  (due_at, lease, worker, attempts, error) = (
    select q.due_at, q.lease, q.worker, q.attempts, null
    where q.lease is not null and q.due_at <= now()
    union all
    select excluded.due_at, excluded.lease, excluded.worker, excluded.attempts, null
    limit 1
  )
returning
  q.event_id,
  (select k.lease from token k) as lease,
  q.lease = (select k.lease from token k) as is_claimed,
  (select max(t.place)::text from taken t) as position,
  (select count(*) from taken) as changes,
"""
# For a claim that must leave a trace, should the server crash over the texts that are read next.
TAKE = _TAKE + "  (select" + _DURABLY + "),\n  null::text as input\n"

# The same, and the text of what is new in the queue, which saves a round trip. If a newer one was
# taken and done with since the statement began, the hash in WRITE refuses this one.
TAKE_AND_READ = (
    _TAKE  # noqa: S608  two constants
    + """\
  case when q.version = 1 then (
    select coalesce(e.input, '') from listener.event e where e.id = q.event_id
  ) end as input
"""
)

# Lease up to `events` due events: live ones, then backfill unless `live_only`. Events whose worker
# died are kept apart: the first time a quarter of a claim, later alone, so that one that kills the
# process is found while its mates finish; after `most_deaths` attempts they are parked. Its commit
# waits for the disk, or one that makes the server crash would leave no trace.
CLAIM = (
    """
with live as materialized (
  select q.event_id, q.lane, q.due_at, q.lease, q.attempts
  from listener.queue q
  where q.lane = 0 and q.due_at <= now()
  order by q.due_at
  limit %(events)s
  for update skip locked
), backfill as materialized (
  select q.event_id, q.lane, q.due_at, q.lease, q.attempts
  from listener.queue q
  where q.lane = 1 and q.due_at <= now()
  order by q.due_at
  limit (select case when %(live_only)s then 0 else %(events)s - count(*) end from live)
  for update skip locked
), due as (
  select
    d.event_id,
    row_number() over (order by d.lane, d.due_at) as place,
    case when d.lease is null then 0 else d.attempts end as deaths,
    d.attempts >= %(most_deaths)s as is_spent
  from (select * from live union all select * from backfill) d
), taken as (
  select d.event_id, d.deaths > 0 as was_leased, d.is_spent
  from due d
  where d.deaths = (select first.deaths from due first where first.place = 1)
    and d.place <= case d.deaths
      when 0 then %(events)s
      when 1 then greatest(%(events)s / 4, 1)
      else 1
    end
), token as materialized (
  select pg_catalog.nextval('listener.lease_token') as lease
)
update listener.queue q
set
  lease = case when not t.is_spent then k.lease end,
  worker = case when not t.is_spent then %(worker)s::bigint end,
  attempts = least(q.attempts + 1, %(most_deaths)s),
  due_at = case
    when t.is_spent then 'infinity'
    else now() + %(lease_seconds)s * interval '1 second'
  end,
  error = case
    when t.is_spent
    then coalesce(q.error, 'its worker died or lost its lease on every attempt')
    else q.error
  end
from
  taken t,
  token k,
"""  # noqa: S608  constants
    + _DURABLY
    + """
where q.event_id = t.event_id
returning q.event_id, q.lease, q.attempts, t.was_leased
"""
)

# Version and text out of one snapshot, in a statement of its own: the claim locks the newest
# version of a queue row but would read the event as of its start, and so could pair a new version
# with an old text. The text by a look-up of its own: as a column of the outer join it might be
# computed for every event there is.
READ = """
select
  q.event_id,
  q.version,
  e.id is null as is_deleted,
  coalesce((select t.input from listener.event t where t.id = e.id), '') as input
from listener.queue q
left join listener.event e on e.id = q.event_id
where q.event_id = any(%(event_ids)s)
  and q.lease = %(lease)s
"""

# Store and acknowledge. The joins fence out a claim whose lease has passed to another worker, an
# event that changed while it was encoded (by its version, and by its text even where triggers were
# off), and one deleted meanwhile. Events and vectors that somebody holds are skipped rather than
# waited for: they are about to change or go, and a wait would hold up who needs the others. Vectors
# come in at the end, by their place; every step before would copy them.
WRITE = """
with done as (
  select *
  from unnest(
    %(event_ids)s, %(versions)s::integer[], %(hashes)b::bytea[]
  ) with ordinality as d (event_id, version, content_hash, place)
), held as materialized (
  select q.event_id, d.content_hash, d.place
  from done d
  join listener.queue q
    on q.event_id = d.event_id
    and q.version = d.version
    and q.lease = %(lease)s
  for update of q skip locked
), alive as materialized (
  select h.event_id, h.content_hash, h.place, m.event_id is not null as has_vector
  from held h
  join listener.event e on e.id = h.event_id
  left join listener.embedding m on m.event_id = h.event_id
  where h.content_hash = sha256(pg_catalog.convert_to(
    coalesce(e.input, ''), 'UTF8'
  ))
  for key share of e skip locked
), replaceable as materialized (
  select m.event_id
  from alive a
  join listener.embedding m on m.event_id = a.event_id
  where a.has_vector
  for no key update of m skip locked
), stored as (
  insert into listener.embedding as m
    (event_id, embedding, model, content_hash, embedded_at)
  select
    a.event_id,
    (%(embeddings)b)[a.place::integer],
    %(model)s,
    a.content_hash,
    clock_timestamp()
  from alive a
  where not a.has_vector or a.event_id in (select r.event_id from replaceable r)
  order by a.event_id
  on conflict (event_id) do update set
    embedding = excluded.embedding,
    model = excluded.model,
    content_hash = excluded.content_hash,
    embedded_at = excluded.embedded_at
  returning m.event_id
)
delete from listener.queue q
using stored s
where q.event_id = s.event_id
returning
  q.event_id,
  -- Since the writer's transaction began; nobody waited for a backfill.
  case
    when q.lane = 0
    then greatest(extract(epoch from clock_timestamp() - q.queued_at)::float8, 0)
  end as seconds_since_change
"""

STILL_LEASED = """
select q.event_id
from listener.queue q
where q.event_id = any(%(event_ids)s) and q.lease = %(lease)s
"""

# Those whose text is another one by now. `has_changed`: the change waits or was taken already; else
# it was made past the triggers, or the text reads differently each time.
OUTDATED = """
select
  q.event_id,
  q.version <> d.version
    or exists (select from listener.change c where c.event_id = q.event_id) as has_changed
from unnest(
  %(event_ids)s, %(versions)s::integer[], %(hashes)s::bytea[]
) as d (event_id, version, content_hash)
join listener.queue q on q.event_id = d.event_id and q.lease = %(lease)s
join listener.event e on e.id = d.event_id
where e.content_hash is distinct from d.content_hash
"""

# Waits for nobody, so in no order. What is skipped is due again when its lease ends.
_HELD = """
with held as materialized (
  select q.event_id
  from listener.queue q
  where q.event_id = any(%(event_ids)s) and q.lease = %(lease)s
  for update skip locked
)
"""

# A failed attempt: due again later, or parked after the last one. Not once the lease is over: a
# change may have been taken since, and the attempt was at the text of before (TAKE leaves the lease
# of an event that was claimed and never answered).
FAIL = (
    _HELD
    + """\
update listener.queue q
set
  lease = null,
  worker = null,
  error = %(error)s,
  due_at = case
    when q.attempts >= %(max_attempts)s then 'infinity'
    else now() + (0.5::float8 + random()) * interval '1 second'
      * least(3600, %(retry_seconds)s * pg_catalog.power(2::float8, (q.attempts - 1)::float8))
  end
from held h
where q.event_id = h.event_id and q.due_at > now()
returning
  q.event_id,
  q.attempts,
  q.due_at = 'infinity' as parked,
  extract(epoch from nullif(q.due_at, 'infinity') - now())::float8 as retry_in_seconds
"""
)

# Give a claim back as if it had not been made; due a while from now, or at its old place in line;
# at once where a clock that was set back has put that place into the future. Its commit waits for
# the disk: undone by a crash, it would be a claim that nobody remembers, as of a worker that died.
RELEASE = (
    _HELD
    + """\
update listener.queue q
set
  lease = null,
  worker = null,
  attempts = greatest(q.attempts - 1, 0),
  due_at = case
    when %(delay_seconds)s = 0::float8 then least(q.queued_at, now())
    else now() + %(delay_seconds)s * interval '1 second'
  end
from
  held h,
"""
    + _DURABLY
    + """
where q.event_id = h.event_id
"""
)

# Not one that is over, for FAIL's reason.
EXTEND = (
    _HELD
    + """\
update listener.queue q
set due_at = now() + %(lease_seconds)s * interval '1 second'
from held h
where q.event_id = h.event_id and q.due_at > now()
"""
)

# What a function's body names is looked up only when it is called; this calls it for no event.
TRY_INPUT = "select listener.input_of(null)"
FORGET_PLANS = "discard plans"

# Before a statement that takes an event for gone where it doesn't see it, in one message with it.
# What row-level security hides is an error; and the statement's snapshot is from after the lock on
# iot_events, while one from before DDL that rewrites the table would show it empty.
WITH_ALL_EVENTS = """
set transaction isolation level read committed;
set local search_path = '';
set local row_security = off;
select from listener.event limit 0;
set local row_security = default;
"""

# Those that are deleted, as a fresh snapshot sees it. One that came back with the same id stays: it
# is visible now, or was taken since, under a new lease or after the end of this one.
DISCARD = """
with held as materialized (
  select q.event_id
  from listener.queue q
  where q.event_id = any(%(event_ids)s)
    and q.lease = %(lease)s
    and q.due_at > now()
    and not exists (select from listener.event e where e.id = q.event_id)
  for update skip locked
)
delete from listener.queue q
using held h
where q.event_id = h.event_id
"""

# --- sweep -------------------------------------------------------------------------------------

# Its commit waits for the disk: what a crash of the server undid would go unnoticed, as the sweep
# goes on with the next page.
SWEEP = (
    """
select s.scanned, s.queued, s.next_from
from
"""
    + _DURABLY
    + """,
  listener.sweep(%(model)s, %(start)s, %(events)s, %(since)s) s
"""
)

# Parked events that were deleted.
DISCARD_PARKED = """
with held as materialized (
  select q.event_id
  from listener.queue q
  where q.lane in (0, 1)
    and q.due_at = 'infinity'
    and not exists (select from listener.event e where e.id = q.event_id)
  for update skip locked
)
delete from listener.queue q
using held h
where q.event_id = h.event_id
"""

# Embeddings of no event: the foreign key's triggers were off, or iot_events is another table.
DELETE_ORPHANS = """
delete from listener.embedding m
where not exists (select from listener.event e where e.id = m.event_id)
  -- Not one that was written while this ran, for an event that came back with its id.
  and m.embedded_at < now()
"""

RETRY = """
with held as materialized (
  select q.event_id
  from listener.queue q
  where q.lane in (0, 1)
    and q.due_at = 'infinity'
    -- Null is all.
    and (q.event_id = any(%(event_ids)s)) is not false
  order by q.event_id
  for update skip locked
)
update listener.queue q
set due_at = now(), attempts = 0, error = null
from held h
where q.event_id = h.event_id
returning q.event_id
"""

# --- reading -----------------------------------------------------------------------------------

STATUS = """
select
  s.embedded,
  s.embedded_is_estimate,
  s.pending,
  s.pending_live,
  s.pending_backfill,
  s.oldest_pending_seconds,
  s.parked,
  s.last_error
from listener.status s
"""

# Until the transaction's end; a pooler's next client doesn't inherit it.
LIMIT_STATEMENT = "select pg_catalog.set_config('statement_timeout', %(duration)s, true)"

# Only what a metric shows: a column of the view that isn't asked for is not computed.
GAUGES = """
select
  s.pending_live,
  s.pending_backfill,
  coalesce(s.oldest_live_seconds, 0) as oldest_live_seconds,
  coalesce(s.oldest_backfill_seconds, 0) as oldest_backfill_seconds,
  s.parked,
  s.workers
from listener.status s
"""

WORKERS = """
select w.worker, w.host, w.pid, w.model, w.started_at, w.seen_at
from listener.live_worker w
order by w.worker
"""

COVERAGE = "select c.events, c.current from listener.coverage(%(model)s, %(last)s) c"

PARKED = """
select q.event_id, q.attempts, q.error
from listener.queue q
where q.lane in (0, 1)
  and q.due_at = 'infinity'
  -- One that has changed since is pending.
  and not exists (select from listener.change c where c.event_id = q.event_id)
order by q.queued_at
limit %(limit)s
"""

DESCRIBE = "select * from listener.describe(%(event_id)s)"

NEAREST = "select * from listener.nearest(%(embedding)s, %(model)s, %(limit)s)"

PENDING = "select count(*) from listener.waiting"
# Without those that came later.
PENDING_SINCE = "select count(*) from listener.waiting w where w.since <= to_timestamp(%(moment)s)"
# For the service itself, which asks again and again: it looks at so many rows and no more.
BACKLOG = """
with pending as materialized (
  select q.event_id, q.queued_at as since from listener.queue q where q.due_at < 'infinity'
  union all
  select c.event_id, c.changed_at from listener.change c
  limit %(limit)s
)
select
  pg_catalog.count(distinct p.event_id) as events,
  coalesce(extract(epoch from now() - min(p.since)), 0)::float8 as oldest_seconds,
  count(*) >= %(limit)s as is_more
from pending p
"""
# Those that RETRY takes, so also one that has changed since.
PARKED_COUNT = """
select count(*) from listener.queue q where q.lane in (0, 1) and q.due_at = 'infinity'
"""

# --- checks ------------------------------------------------------------------------------------

APPLIED = "select a.file, a.digest, a.columns from listener.applied a"

CLOCK = "select extract(epoch from clock_timestamp())"

# Which of the vector indexes the operator of listener.nearest can use.
VECTOR_INDEXES = """
select
  ic.relname as name,
  c.opcname as opclass,
  i.indisvalid as is_valid,
  a.attname = 'embedding' and exists (
    select from pg_catalog.pg_amop o
    join pg_catalog.pg_operator p on p.oid = o.amopopr
    where o.amopfamily = c.opcfamily and p.oprname = '<=>'
  ) as serves_search
from pg_catalog.pg_index i
join pg_catalog.pg_class ic on ic.oid = i.indexrelid
join pg_catalog.pg_class t on t.oid = i.indrelid
join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace
join pg_catalog.pg_am am on am.oid = ic.relam
join pg_catalog.pg_opclass c on c.oid = i.indclass[0]
left join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
-- By name: the schema may be closed to the worker.
where tn.nspname = 'public'
  and t.relname = 'event_embeddings'
  and am.amname in ('hnsw', 'ivfflat')
order by ic.relname
"""

# A trigger there would run with the rights of the owner, or of the service; and no policy stops a
# truncate.
TOO_MUCH_GRANTED = """
select distinct coalesce(pg_catalog.quote_ident(g.rolname), 'public')
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
cross join lateral pg_catalog.aclexplode(c.relacl) a
left join pg_catalog.pg_roles g on g.oid = a.grantee
where n.nspname = 'public'
  and c.relname = 'event_embeddings'
  and a.grantee <> c.relowner
  and a.privilege_type in ('TRIGGER', 'TRUNCATE', 'REFERENCES')
order by 1
"""

# --- report ------------------------------------------------------------------------------------

# Of the newest events by page, because there is no index on embedded_at. LATENCY is for an
# iot_events with created_at.
LATENCY = """
with recent as materialized (
  select l.seconds from listener.latency(%(last)s) as l (seconds)
)
select
  pg_catalog.percentile_cont(array[0.5, 0.95, 0.99])
    within group (order by r.seconds) as percentiles,
  (select pg_catalog.jsonb_object_agg(b.bar, b.events)
   from (
     select pg_catalog.width_bucket(l.seconds, %(bounds)s::float8[]) as bar, count(*) as events
     from recent l
     group by 1
   ) b) as bars
from recent r
"""

THROUGHPUT = """
select
  extract(epoch from date_trunc('second', m.embedded_at))::bigint as second,
  count(*) as events
from listener.page(null, null, %(last)s, null) p
join listener.embedding m on m.event_id = p.event_id
group by 1
order by 1
"""
