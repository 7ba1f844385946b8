"""Waiting for a lock without blocking writers: briefly, again and again, naming the holder.

A request for a lock that waits blocks every later one on the table.
"""

from __future__ import annotations

from collections.abc import Callable

from psycopg import errors
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from listener.database import Connection
from listener.errors import SchemaError

PATIENCE_SECONDS = 60.0
# Under a short time-out of role or database the lock would not be named, nor waited for again.
_TIMEOUTS = "set local lock_timeout = '2s'; set local statement_timeout = 0"
_NOT_NOW = (errors.LockNotAvailable, errors.DeadlockDetected)

# Who outlasted our 2 s is older than that; who queued up behind us may have the lock by now, but is
# younger. Of the old ones writers first: a reader is in the way of an uninstall only. A prepared
# transaction has no process.
_HOLDER = """
select
  l.relation::regclass::text,
  l.pid,
  coalesce(p.gid, nullif(a.application_name, ''), 'without a name'),
  case when p.gid is null then coalesce(a.state, 'in a transaction') else 'prepared' end,
  extract(epoch from clock_timestamp() - coalesce(p.prepared, a.xact_start))::integer
from pg_catalog.pg_locks l
left join pg_catalog.pg_stat_activity a on a.pid = l.pid
left join pg_catalog.pg_locks x
  on l.pid is null
  and x.pid is null
  and x.virtualtransaction = l.virtualtransaction
  and x.locktype = 'transactionid'
left join pg_catalog.pg_prepared_xacts p on p.transaction = x.transactionid
where l.locktype = 'relation'
  and l.granted
  and l.database = (
    select d.oid from pg_catalog.pg_database d where d.datname = current_database()
  )
  and l.relation in (
    to_regclass('public.iot_events')::oid,
    to_regclass('public.event_embeddings')::oid,
    to_regclass('listener.change')::oid,
    to_regclass('listener.queue')::oid,
    to_regclass('listener.worker')::oid,
    to_regclass('listener.applied')::oid
  )
  and coalesce(clock_timestamp() - coalesce(p.prepared, a.xact_start) > interval '2 s', true)
order by
  l.mode in ('AccessShareLock', 'RowShareLock'),
  coalesce(p.prepared, a.xact_start),
  l.relation
limit 1
"""


def patiently(conn: Connection, change: Callable[[], None], tell: Callable[[str], None]) -> None:
    """Run `change` in one transaction, again while a lock is not to be had at once.

    `tell` gets a line about who holds it, each time. Raises SchemaError, with nothing changed,
    after PATIENCE_SECONDS.
    """

    def attempt() -> None:
        with conn.transaction():
            conn.execute(_TIMEOUTS)
            change()

    def announce(state: RetryCallState) -> None:
        assert state.next_action is not None  # noqa: S101  tenacity calls this before a sleep only
        seconds = state.next_action.sleep
        tell(f"waiting for a lock: {_holder(conn)}; trying again in {seconds:.1f} s")

    attempts = Retrying(
        retry=retry_if_exception_type(_NOT_NOW),
        wait=wait_random_exponential(multiplier=0.5, max=5),
        stop=stop_after_delay(PATIENCE_SECONDS),
        before_sleep=announce,
        reraise=True,
    )
    try:
        attempts(attempt)
    except _NOT_NOW:
        raise SchemaError(
            f"no lock within {PATIENCE_SECONDS:.0f} s: {_holder(conn)}; nothing was changed; "
            "end that transaction, or try again later"
        ) from None


def _holder(conn: Connection) -> str:
    """Who holds a lock on a table of ours, in words."""
    row = conn.execute(_HOLDER).fetchone()
    if row is None:
        return "its holder has ended by now, or began less than 2 s ago"
    relation, pid, name, state, seconds = row
    who = f"pid {pid} ({name}, {state}" if pid else f"transaction {name} ({state}"
    return f"{who}{'' if seconds is None else f' for {seconds} s'}) holds {relation}"
