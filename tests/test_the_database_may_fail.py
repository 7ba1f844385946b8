"""A server that crashes, refuses, stalls or turns read-only loses nothing; we outlive it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from listener import queries
from listener.config import Settings
from listener.database import connect
from listener.embedded import Server
from listener.queue import Queue
from tests.harness import Database, TinyEmbedder, install_demo, is_asleep, serving, wait_until

MakeServer = Callable[..., Server]


@contextmanager
def installed(server: Server) -> Iterator[Database]:
    """The demo's iot_events with the listener installed, in a server of the test's own."""
    settings = Settings(database_url=server.url(), poll_seconds=120.0, retry_seconds=0.05)
    with connect(settings, "listener-test") as conn:
        install_demo(conn)
        yield Database.owned(settings, conn)


class CountingEmbedder(TinyEmbedder):
    """Counts the batches that it was asked for, also those that it is held at."""

    calls = 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls += 1
        return super().encode(texts)


@contextmanager
def reconnected(database: Database) -> Iterator[Database]:
    """The same database over a new connection, once it accepts one."""

    def open_connection() -> psycopg.Connection[object] | None:
        try:
            return connect(database.owner, "listener-test")
        except Exception:  # noqa: BLE001  whatever it is, it is tried again until the deadline
            return None

    with wait_until(open_connection) as conn:
        yield replace(database, conn=conn)


def test_twenty_crashes_of_the_server_in_mid_batch_lose_double_and_park_nothing(
    make_server: MakeServer,
) -> None:
    """Immediate stops; more of them than an event has attempts."""
    server = make_server()
    embedder = CountingEmbedder()
    with installed(server) as first:
        first.insert(*(f"event {number}" for number in range(3000)))
    with serving(first.with_settings(max_attempts=3), embedder) as service:
        for _ in range(20):
            embedder.may_run.clear()
            held = embedder.calls
            with reconnected(first) as database:
                wait_until(partial(is_in_mid_batch, database, embedder, held))
            server.stop("immediate")
            embedder.may_run.set()
            server.start()
        with reconnected(first) as database:
            wait_until(lambda: len(database.embedded()) == 3000, 60)
            database.wait_for_rest()
            database.assert_invariant()
            assert database.queue() == []
        service.stop()


def is_in_mid_batch(database: Database, embedder: CountingEmbedder, calls: int) -> bool:
    """Whether the model was asked for more than so many batches, or all are done."""
    return embedder.calls > calls or database.is_at_rest()


def test_a_crash_undoes_no_page_of_a_sweep(make_server: MakeServer) -> None:
    """The sweep goes on with the next page: what the crash undid would wait for the next sweep."""
    server = make_server("wal_writer_delay=10s")
    with installed(server) as first, first.session() as work:
        first.insert(*map(str, range(10)))
        first.forget_queue()
        work.execute(queries.SERVICE_SESSION)

        Queue(work, first.settings, None).sweep(TinyEmbedder.fingerprint, None, 10)

        server.stop("immediate")
    server.start()
    with reconnected(first) as database:
        assert len(database.queue()) == 10


def test_a_server_without_a_free_connection_is_waited_for(make_server: MakeServer) -> None:
    """Also when the service loses its own connections meanwhile."""
    server = make_server("max_connections=12", "superuser_reserved_connections=0")
    with installed(server) as database, serving(database), ExitStack() as stack:
        wait_until(lambda: is_asleep(database))
        database.terminate("listener-w%")
        assert wait_until(lambda: not connects(database, stack))
        database.insert("no connection is free")
        stack.close()

        wait_until(database.embedded)


def connects(database: Database, stack: ExitStack) -> bool:
    """Take one more connection. Returns whether there was one."""
    try:
        stack.enter_context(psycopg.connect(database.settings.database_url))
    except psycopg.OperationalError:
        return False
    return True


def test_a_statement_that_takes_too_long_costs_the_events_no_attempt(database: Database) -> None:
    """A migration holds the vectors' table for longer than the service waits for an answer."""
    database = database.with_settings(max_attempts=1)
    embedder = TinyEmbedder()
    with serving(database, embedder), database.session() as migration:
        wait_until(lambda: is_asleep(database))
        with migration.transaction():
            migration.execute("lock table public.event_embeddings in share mode")
            database.insert("during the migration")
            # Given up once by the server, and tried again by a new session.
            first = wait_until(lambda: writers(database))
            wait_until(lambda: writers(database) - first, 15)

        wait_until(database.embedded)

    assert len(embedder.encoded) == 1
    assert database.queue() == []


def writers(database: Database) -> set[int]:
    """The backends of the service that wait for a lock."""
    rows = database.rows(
        "select pid from pg_stat_activity where datname = current_database() "
        "and application_name = 'listener-work' and wait_event_type = 'Lock'"
    )
    return {pid for (pid,) in rows}


@pytest.mark.parametrize("table", ["listener.queue", "public.iot_events"])
def test_a_lock_held_by_a_migration_is_waited_out(database: Database, table: str) -> None:
    """DDL on the queue or on iot_events; then all is embedded."""
    embedder = TinyEmbedder()
    with serving(database, embedder), database.session() as migration:
        wait_until(lambda: is_asleep(database))
        # Else it might be done with the event before the lock is there.
        embedder.may_run.clear()
        database.insert("before")
        with migration.transaction():
            migration.execute(f"lock table {table} in access exclusive mode".encode())
            embedder.may_run.set()
            wait_until(lambda: writers(database))
        database.insert("after")

        wait_until(lambda: len(database.embedded()) == 2)
        database.assert_invariant()


def test_a_serializable_default_fails_no_claim(database: Database) -> None:
    """A default made for the dashboard doesn't reach the service's sessions."""
    name = database.value("select current_database()")
    database.rows(f'alter database "{name}" set default_transaction_isolation = serializable')
    with serving(database, TinyEmbedder()), serving(database, TinyEmbedder()):
        for number in range(50):
            database.insert(f"event {number}")
            database.rows("update public.iot_events set message = message || '.' where id = 1")
        database.wait_for_rest()
        # Each of the two has connected once.
        assert database.value("select last_value from listener.worker_token") == 2

    assert len(database.embedded()) == 50
    database.assert_invariant()


def test_a_primary_that_turned_read_only_is_waited_for(make_server: MakeServer) -> None:
    """As during a fail-over; then the service goes on by itself."""
    server = make_server()
    with installed(server) as database, serving(database):
        wait_until(lambda: is_asleep(database))
        database.insert("while writable")
        wait_until(database.embedded)
        database.rows("alter system set default_transaction_read_only = on")
        database.rows("select pg_reload_conf()")
        wait_until(lambda: is_read_only(database))
        database.rows("set default_transaction_read_only = off")
        database.insert("while read-only for others")
        wait_until(lambda: not is_asleep(database))
        assert len(database.embedded()) == 1

        database.rows("alter system reset default_transaction_read_only")
        database.rows("select pg_reload_conf()")

        wait_until(lambda: len(database.embedded()) == 2)


def is_read_only(database: Database) -> bool:
    """Whether a session that begins now may not write."""
    with database.session() as conn:
        return conn.execute("show default_transaction_read_only").fetchone() == ("on",)


def test_a_standby_is_waited_for_until_it_is_promoted(make_server: MakeServer) -> None:
    """LISTEN raises there; after the promotion the service serves."""
    primary = make_server("wal_level=replica")
    with installed(primary) as database:
        database.insert("written on the primary")
    primary.stop()
    standby = primary
    signal_file = standby.home / "data" / "standby.signal"
    signal_file.touch()
    shutil.chown(signal_file, (standby.home / "data").owner())
    standby.start()
    with reconnected(database) as seen, serving(database):
        wait_until(lambda: tried_to_register(seen))
        assert seen.embedded() == {}
        seen.rows("select pg_promote()")

        wait_until(seen.embedded)


def tried_to_register(database: Database) -> bool:
    """Whether the service has a connection to this server."""
    return bool(
        database.value(
            "select count(*) from pg_stat_activity where application_name like 'listener-w%%'"
        )
    )


def test_an_old_open_transaction_holds_up_no_event(database: Database) -> None:
    """A report that runs for hours sees its own snapshot; new events have their vectors."""
    with serving(database), database.session() as report:
        with report.transaction():
            report.execute("set transaction isolation level repeatable read")
            report.execute("select count(*) from public.iot_events")
            for number in range(200):
                database.insert(f"event {number}")
            database.wait_for_rest()
            assert report.execute("select 1").fetchone()

        assert len(database.embedded()) == 200
