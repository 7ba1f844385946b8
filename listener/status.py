"""`listener status`: counts, coverage of the scope, workers, and the last error."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from psycopg.rows import dict_row

from listener import queries
from listener.config import Settings
from listener.database import Connection, reading, translated
from listener.errors import ConfigError
from listener.logs import redact

_PARKED_SHOWN = 20
# No more rows than this are counted.
_COUNTED = 10_000


def read_status(conn: Connection, settings: Settings) -> dict[str, Any]:
    """The numbers of `status --json`, ready for json.dumps with default=str."""
    with reading(conn), conn.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(queries.STATUS).fetchone()
        assert row is not None  # noqa: S101  the view has one row
        status = dict(row)
        status["parked_events"] = cursor.execute(
            queries.PARKED, {"limit": _PARKED_SHOWN}
        ).fetchall()
    status["workers"] = read_workers(conn)
    status["scope"] = _scope(conn, settings)
    return status


def read_backlog(conn: Connection) -> str:
    """How many events wait, and for how long the oldest has; at a cost that doesn't grow."""
    with translated():
        row = conn.execute(queries.BACKLOG, {"limit": _COUNTED}).fetchone()
    assert row is not None  # noqa: S101  an aggregate has one row
    events, oldest_seconds, is_more = row
    least = "over " if is_more else ""
    return f"backlog {least}{events} events, lag {least}{oldest_seconds:.1f} s"


def count_pending(conn: Connection) -> int:
    """How many events wait, parked ones not counted."""
    return _count(conn, queries.PENDING)


def count_pending_since(conn: Connection, moment: float) -> int:
    """How many events have waited since then or longer; by the database's clock."""
    return _count(conn, queries.PENDING_SINCE, moment=moment)


def count_parked(conn: Connection) -> int:
    """How many events are parked."""
    return _count(conn, queries.PARKED_COUNT)


def _count(conn: Connection, statement: str, **parameters: float) -> int:
    with reading(conn):
        row = conn.execute(statement, parameters).fetchone()
    assert row is not None  # noqa: S101  an aggregate has one row
    return int(row[0])


def read_workers(conn: Connection) -> list[dict[str, Any]]:
    """The workers that live. One behind a pooler may not be seen."""
    with reading(conn), conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(queries.WORKERS).fetchall()


def other_model(workers: list[dict[str, Any]], fingerprint: str) -> str | None:
    """What to say of the first worker that embeds with another model; None if none does."""
    for worker in workers:
        if worker["model"] != fingerprint:
            return (
                f"worker {worker['worker']} on {worker['host']} embeds with {worker['model']}; set "
                "the same EMBEDDING_MODEL, EMBEDDING_REVISION and PRECISION for all, or they undo "
                "each other's work"
            )
    return None


def _scope(conn: Connection, settings: Settings) -> dict[str, Any]:
    """Coverage of the last N; None, and the problem, where its model can't be found."""
    last = settings.backfill_last_n
    try:
        model = _fingerprint(settings)
    except ConfigError as error:
        unknown = {"model": None, "events": None, "current": None}
        return {"last_n": last, **unknown, "problem": redact(str(error), settings.secrets())}
    with reading(conn):
        row = conn.execute(queries.COVERAGE, {"model": model, "last": last}).fetchone()
    assert row is not None  # noqa: S101  the function gives one row
    events, current = row
    return {"last_n": last, "model": model, "events": events, "current": current, "problem": None}


# Of a directory it is a digest of all files, too much for each look of `status --watch`.
@lru_cache(maxsize=1)
def _fingerprint(settings: Settings) -> str:
    # Imports the hub's client, after HF_HUB_OFFLINE is set and only here.
    from listener.model import locate

    return locate(settings).fingerprint


def status_lines(status: dict[str, Any]) -> list[str]:
    """The status as lines for a person."""
    scope = status["scope"]
    about = "about " if status["embedded_is_estimate"] else ""
    oldest = status["oldest_pending_seconds"]
    lines = [
        f"embedded        {about}{status['embedded']}",
        f"pending         {status['pending']}",
        f"oldest pending  {'-' if oldest is None else f'{oldest:.1f} s'}",
        f"parked          {status['parked']}",
    ]
    if scope["events"] is None:
        lines.append(f"coverage        unknown: {scope['problem']}")
    else:
        share = 100 * scope["current"] / scope["events"] if scope["events"] else 100.0
        lines.append(
            f"coverage        {share:.1f} % of the last {scope['last_n']} events "
            f"({scope['current']} of {scope['events']}, BACKFILL_LAST_N), model {scope['model']}"
        )
    for worker in status["workers"]:
        lines.append(
            f"worker          {worker['worker']} on {worker['host']}, pid {worker['pid']}, "
            f"since {worker['started_at']:%Y-%m-%d %H:%M:%S %Z}, seen at "
            f"{worker['seen_at']:%H:%M:%S}, {worker['model']}"
        )
    if not status["workers"]:
        lines.append("worker          none")
    for event in status["parked_events"]:
        lines.append(
            f"parked event    {event['event_id']} after {event['attempts']} attempts: "
            f"{event['error']}"
        )
    lines.append(f"last error      {status['last_error'] or '-'}")
    return lines
