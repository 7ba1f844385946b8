"""What is done stays in the tables as dead rows while anybody holds a snapshot; it must go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

from listener import queries
from listener.database import Connection
from listener.queue import Queue
from listener.worker import beat
from tests.harness import Database, claimed, is_waited_for, role, serving, store, unread, wait_until

_TABLES = ("listener.queue", "listener.change")
# More than the beat lets pass.
_MANY = 6_000


@pytest.fixture
def service(database: Database) -> Iterator[Connection]:
    """A connection as the service opens it, which waits for no lock for long."""
    with database.service_session() as conn:
        conn.execute(queries.SERVICE_SESSION)
        yield conn


@contextmanager
def held_snapshot(database: Database) -> Iterator[Connection]:
    """A session that took a snapshot of the events and keeps it, as a long report does."""
    with database.session() as conn:
        conn.isolation_level = IsolationLevel.REPEATABLE_READ
        conn.autocommit = False
        conn.execute("select count(*) from public.iot_events")
        yield conn
        conn.rollback()


_DEAD_CHANGES = "select pg_stat_get_dead_tuples('listener.change'::regclass)"


def files(database: Database) -> set[int]:
    """Where the rows of both tables are on the disk; a truncate begins new files."""
    return {database.value("select pg_relation_filenode(%s::regclass)", table) for table in _TABLES}


def sizes(database: Database) -> list[int]:
    """Bytes of queue and change, live and dead rows."""
    return [database.value("select pg_relation_size(%s)", table) for table in _TABLES]


def contents(database: Database) -> list[list[Any]]:
    return [
        database.rows("select q::text from listener.queue q order by event_id"),
        database.rows("select c::text from listener.change c order by event_id"),
    ]


def compact(conn: Connection) -> None:
    conn.execute(queries.COMPACT)


def test_dead_rows_go_although_a_snapshot_is_held(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that drained much gets rid of what it left, which vacuum can't."""
    # A beat in mid-drain would leave too little for one that comes after.
    is_drained = threading.Event()
    monkeypatch.setattr(
        "listener.service.beat", lambda *session: is_drained.is_set() and beat(*session)
    )
    with held_snapshot(database), serving(database.with_settings(backfill_last_n=0)):
        database.insert(*["a", "b"] * (_MANY // 2))
        database.wait_for_rest()
        assert len(database.embedded()) == _MANY
        is_drained.set()

        wait_until(lambda: sizes(database) == [0, 0])

        database.insert("c")
        database.wait_for_rest()
    database.assert_invariant()


def test_what_lives_is_kept_as_it_was(database: Database, service: Connection) -> None:
    """A parked event, a change that waits, and a claim, which can still be written."""
    queue = Queue(service, database.settings, None)
    database.insert("done", "held")
    database.rows("delete from public.iot_events where message = 'done'")
    claim = claimed(queue)
    events = queue.read(claim)
    database.park(*database.insert("parked"))
    database.insert("waiting")
    before, before_files = contents(database), files(database)

    compact(service)

    assert contents(database) == before
    # Both were emptied, and filled again.
    assert not files(database) & before_files
    assert store(queue, claim, events)


def test_a_writer_in_flight_is_neither_waited_for_nor_lost(
    database: Database, service: Connection
) -> None:
    """Its row stays where it is; the queue, which it doesn't use, is emptied all the same."""
    queue = Queue(service, database.settings, None)
    database.insert("gone")
    claim = unread(queue)
    database.rows("delete from public.iot_events")
    queue.read(claim)
    with database.session() as writer, writer.transaction():
        writer.execute(
            "insert into public.iot_events (device_id, event_type, severity, message) "
            "values ('d', 't', 's', 'in flight')"
        )

        compact(service)

        assert sizes(database)[0] == 0
        assert sizes(database)[1] > 0
    assert [row.version for row in database.queue()] == [0]


def test_long_tables_are_left_alone(database: Database, service: Connection) -> None:
    """To move thousands of rows would keep the writers out for long; none of them is lost."""
    claimed(Queue(service, database.settings, None), len(database.insert(*["a"] * 3_000)))
    database.insert(*["b"] * 3_000)
    before = contents(database), files(database)
    assert [len(rows) for rows in before[0]] == [3_000, 3_000]

    compact(service)

    assert (contents(database), files(database)) == before


def test_a_table_that_has_grown_since_it_was_looked_at_is_left_alone(
    database: Database, service: Connection
) -> None:
    """What came between the look and the lock would else be lost."""
    claimed(Queue(service, database.settings, None), len(database.insert(*["a"] * 3_000)))
    database.insert(*["b"] * 3_000)
    before = contents(database)
    # As if nothing had been there at the look.
    source = database.value("select pg_get_functiondef('listener.compact()'::regprocedure)")
    assert source.count(") first) <= v_most") == 2
    database.rows(source.replace(") first) <= v_most", ") first) >= 0"))

    compact(service)

    assert contents(database) == before


def test_nobody_is_kept_out_of_a_long_table(database: Database, service: Connection) -> None:
    """Even to see that it is long takes its time where many of its rows are dead."""
    claimed(Queue(service, database.settings, None), len(database.insert(*["a"] * 3_000)))
    database.insert(*["a"] * 3_000)
    with database.session() as reader, reader.transaction():
        service.execute("begin")

        compact(service)

        reader.execute("set local lock_timeout = '1s'")
        for table in _TABLES:
            reader.execute(f"select from {table} limit 1".encode())
        service.execute("commit")


def test_who_reads_the_queue_is_not_waited_for(database: Database, service: Connection) -> None:
    """Every claim of every worker would wait behind."""
    database.insert("a")
    service.execute("set lock_timeout = 0; set statement_timeout = '2s'")
    with database.session() as reader, reader.transaction():
        reader.execute("select from listener.queue")

        compact(service)

    assert [row.version for row in database.queue()] == [0]


def test_without_a_right_to_see_who_is_connected_nothing_is_emptied_and_nothing_fails(
    database: Database, service: Connection
) -> None:
    """It is only by the way that the service removes dead rows."""
    before = files(database)
    with role(database.conn, "plain_owner") as owner:
        database.rows(f"grant usage, create on schema listener to {owner}")
        for what in ("table listener.queue", "table listener.change", "function listener.compact"):
            database.rows(f"alter {what} owner to {owner}")
        database.rows("revoke select on pg_catalog.pg_stat_activity from public")

        compact(service)

        database.rows("grant select on pg_catalog.pg_stat_activity to public")
        database.rows(f"reassign owned by {owner} to current_user")
    assert files(database) == before


def test_a_change_that_an_older_snapshot_does_not_show_is_kept(
    database: Database, service: Connection
) -> None:
    """Under a stricter default than ours the function would not see what it empties."""
    service.autocommit = False
    service.isolation_level = IsolationLevel.REPEATABLE_READ
    service.execute("select count(*) from listener.change")
    database.insert("later")

    compact(service)
    service.commit()

    assert [row.version for row in database.queue()] == [0]


def test_nothing_is_emptied_while_a_dump_may_not_have_its_locks_yet(
    database: Database, service: Connection
) -> None:
    """It would see the tables as its snapshot has them: without what was put back."""
    database.insert("waiting")
    before = files(database)
    with database.session("pg_dump"):
        compact(service)
        assert files(database) == before

    def is_emptied() -> bool:
        compact(service)
        return not files(database) & before

    # One of another database is in nobody's way.
    url = database.owner.database_url
    with psycopg.connect(url, dbname="postgres", application_name="pg_dump"):
        wait_until(is_emptied)


def test_nothing_is_emptied_while_a_reader_waits_that_may_have_its_snapshot(
    database: Database, service: Connection
) -> None:
    """As a dump does, under whatever name, that meets a lock on its way."""
    database.insert("waiting")
    with (
        database.session() as locker,
        held_snapshot(database) as reader,
        ThreadPoolExecutor() as pool,
    ):
        with locker.transaction():
            locker.execute("lock table public.event_embeddings in access exclusive mode")
            read = pool.submit(reader.execute, "select from public.event_embeddings")
            wait_until(lambda: is_waited_for(locker, "public.event_embeddings"))
            compact(service)
        read.result()

        assert reader.execute("select count(*) from listener.change").fetchone() == (1,)


def test_few_dead_rows_are_left_to_vacuum(database: Database, service: Connection) -> None:
    """To empty the tables locks writers out for a moment, so it is not done for nothing."""
    queue = Queue(service, database.settings, None)
    database.insert("a")
    claimed(queue)
    service.execute("select pg_stat_force_next_flush()")
    # Where it would see none, it would leave the table alone in any case.
    wait_until(lambda: database.value(_DEAD_CHANGES))

    beat(service, None)

    assert sizes(database)[1] > 0


def test_many_dead_changes_are_enough(database: Database, service: Connection) -> None:
    """An event that changes all the time has many of them, and one row in the queue."""
    (event_id,) = database.insert("a")
    database.rows(
        "insert into listener.change (event_id) select %s from generate_series(1, %s)",
        event_id,
        _MANY,
    )
    claimed(Queue(service, database.settings, None), 2 * _MANY)
    service.execute("select pg_stat_force_next_flush()")

    def is_emptied() -> bool:
        beat(service, None)
        return sizes(database)[1] == 0

    wait_until(is_emptied)


def test_a_publication_for_all_tables_refuses_no_claim(
    database: Database, service: Connection
) -> None:
    """Postgres refuses deletes of what it can't tell a subscriber how to find."""
    database.rows("create publication everything for all tables")
    database.insert("a")
    queue = Queue(service, database.settings, None)

    claim = claimed(queue)

    assert store(queue, claim, queue.read(claim))
