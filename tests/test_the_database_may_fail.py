"""A server that crashes, refuses, stalls or turns read-only loses nothing; we outlive it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from listener import queries
from listener.counters import counters
from listener.database import Connection, connect, is_of_a_row, read_clock
from listener.errors import ConnectionLost
from listener.queue import Queue
from tests.harness import (
    Database,
    Queued,
    TinyEmbedder,
    claimed,
    is_asleep,
    serving,
    store,
    wait_until,
)
from tests.misbehaviour import limit_statements, lose_deadlocks, slow_down_writes
from tests.own_server import MakeServer, become_standby, installed


class AskedEmbedder(TinyEmbedder):
    """Tells whether it has a batch, also one that it is held at."""

    is_asked = False

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.is_asked = True
        try:
            return super().encode(texts)
        finally:
            self.is_asked = False


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


@pytest.mark.usefixtures("quick_reconnects")
def test_twenty_crashes_of_the_server_in_mid_batch_lose_double_and_park_nothing(
    make_server: MakeServer,
) -> None:
    """Immediate stops; more of them than an event has attempts."""
    server = make_server()
    embedder = AskedEmbedder()
    with installed(server) as first:
        ids = first.insert(*(f"event {number}" for number in range(3000)))
    with serving(first.with_settings(max_attempts=3), embedder) as service:
        for number in range(20):
            embedder.may_run.clear()
            with reconnected(first) as database:
                # Else it would be done with all of them after some crashes.
                ids += database.insert(*(f"{number}, {mate}" for mate in range(16)))
                wait_until(partial(is_in_mid_batch, database, embedder))
            server.stop("immediate")
            embedder.may_run.set()
            server.start()
        with reconnected(first) as database:
            wait_until(lambda: database.embedded().keys() == set(ids), 60)
            database.wait_for_rest()
            database.assert_invariant()
            assert database.queue() == []
        service.stop()


def is_in_mid_batch(database: Database, embedder: AskedEmbedder) -> bool:
    """Whether the model has a batch of a claim that holds, and nothing else is done meanwhile."""
    is_quiet = database.value(
        "select every(state = 'idle' and clock_timestamp() - state_change > interval '50 ms') "
        "from pg_stat_activity where application_name = 'listener-work'"
    )
    return database.leased() > 0 and embedder.is_asked and bool(is_quiet)


def test_a_connection_lost_before_a_statement_is_not_lost_over_its_events(
    database: Database,
) -> None:
    """As while the model ran; several times over it would make suspects of them."""
    database.insert("a")
    with database.service_session() as conn:
        queue = Queue(conn, database.settings, None)
        claim = claimed(queue)
        events = queue.read(claim)
        # Until its process is gone, and with it the socket.
        assert database.value("select pg_terminate_backend(%s, 5000)", conn.info.backend_pid)

        with pytest.raises(ConnectionLost) as caught:
            store(queue, claim, events)

    assert type(caught.value) is ConnectionLost


@contextmanager
def until_a_crash(make_server: MakeServer) -> Iterator[tuple[Database, Connection]]:
    """A session with the service's settings; then the server crashes, and starts again.

    All is lost that no commit has waited for.
    """
    server = make_server("wal_writer_delay=10s")
    with installed(server) as first, first.session() as work:
        work.execute(queries.SERVICE_SESSION)
        yield first, work
        server.stop("immediate")
    server.start()


def test_a_crash_undoes_no_release(make_server: MakeServer) -> None:
    """Else it would be the claim of a dead worker again, and count an attempt."""
    with until_a_crash(make_server) as (first, work):
        (a,) = first.insert("a")
        queue = Queue(work, first.settings, None)
        claim = claimed(queue)
        # Its commit waits for the disk, and takes the claim along.
        (b,) = first.insert("b")

        queue.release(claim.lease, claim.event_ids)

    with reconnected(first) as database:
        assert database.queue() == [Queued(a), Queued(b, version=0)]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_crash_undoes_no_claim_whose_texts_are_read_apart(
    make_server: MakeServer, is_new: bool
) -> None:
    """Or an event over which the server crashes would leave no trace, and never be found."""
    with until_a_crash(make_server) as (first, work):
        first.insert("a")
        queue = Queue(work, first.settings, None, reads_apart=True)
        claim = claimed(queue)
        if not is_new:
            queue.release(claim.lease, claim.event_ids)
            claimed(queue)

    with reconnected(first) as database:
        assert [(row.attempts, row.is_claimed) for row in database.queue()] == [(1, True)]


def test_a_crash_undoes_no_page_of_a_sweep(make_server: MakeServer) -> None:
    """The sweep goes on with the next page: what the crash undid would wait for the next sweep."""
    with until_a_crash(make_server) as (first, work):
        first.insert(*map(str, range(10)))
        first.forget_queue()

        Queue(work, first.settings, None).sweep(TinyEmbedder.fingerprint, None, 10)

    with reconnected(first) as database:
        assert len(database.queue()) == 10


@pytest.mark.usefixtures("quick_reconnects")
def test_a_server_without_a_free_connection_is_waited_for(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when the service loses its own connections meanwhile."""
    server = make_server("max_connections=12", "superuser_reserved_connections=0")
    with installed(server) as database, serving(database), ExitStack() as stack:
        wait_until(lambda: is_asleep(database))

        def is_refused() -> bool:
            # Again, in case that it was faster than we to take what it had left.
            database.terminate("listener-w%")
            while connects(database, stack):
                pass
            return was_lost(caplog, "too many clients")

        wait_until(is_refused)
        database.insert("no connection is free")
        assert not database.embedded()
        stack.close()

        wait_until(database.embedded)


def was_lost(caplog: pytest.LogCaptureFixture, cause: str) -> bool:
    """Whether the service has lost, or did not get, a connection for this cause."""
    lost = [record for record in caplog.records if record.msg == "connection_lost"]
    return any(cause in str(record.__dict__["fields"]["cause"]) for record in lost)


def connects(database: Database, stack: ExitStack) -> bool:
    """Take one more connection. Returns whether there was one."""
    try:
        stack.enter_context(psycopg.connect(database.settings.database_url))
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize(
    "state",
    [
        *("08000", "0A000", "25000", "26000", "28000", "34000", "3D000", "3F000", "40001", "42601"),
        *("53000", "55006", "55P02", "55P03", "55P04", "57014", "58000", "72000", "F0000"),
        *("HV000", "XX000"),
    ],
)
def test_what_no_row_can_cause_is_blamed_on_none(database: Database, state: str) -> None:
    """An embedding_input that asks another server passes that one's errors on."""
    raise_it = f"do $$ begin raise exception 'x' using errcode = '{state}'; end $$"

    with pytest.raises(psycopg.Error) as failed:
        database.rows(raise_it)

    assert not is_of_a_row(failed.value)


def test_a_lock_that_is_held_for_too_long_costs_the_events_no_attempt(database: Database) -> None:
    """A migration holds the vectors' table for longer than the service waits for an answer."""
    database = database.with_settings(max_attempts=1)
    with serving(database) as service, database.session() as migration:
        wait_until(lambda: is_asleep(database))
        with migration.transaction():
            migration.execute("lock table public.event_embeddings in share mode")
            database.insert("during the migration")
            # Given up once by the server, and tried again by a new session.
            first = wait_until(lambda: writers(database))
            wait_until(lambda: writers(database) - first, 15)

        wait_until(database.embedded)

    assert len(service.embedder.encoded) == 1
    assert database.queue() == []


def test_a_statement_that_takes_too_long_costs_the_events_no_attempt(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gives it up; the events are written in parts, by the same session."""
    limit_statements(monkeypatch, "1s")
    slow_down_writes(database, 0.2)
    database = database.with_settings(max_attempts=1)
    failed = counters.failed_attempts
    with serving(database) as service:
        ids = database.insert(*map(str, range(8)))
        wait_until(lambda: database.embedded().keys() == set(ids))
        assert database.value("select last_value from listener.worker_token") == 1

    assert len(service.embedder.encoded) == 8
    assert counters.failed_attempts == failed
    assert database.queue() == []


@pytest.mark.parametrize("limit", ["transaction_timeout", "idle_in_transaction_session_timeout"])
def test_a_session_that_the_server_ends_for_its_transaction_is_a_lost_connection(
    database: Database, limit: str
) -> None:
    """As through a pooler, where the service lifts no limit; it goes on with another session."""
    if limit == "transaction_timeout" and database.conn.info.server_version < 170000:
        pytest.skip("since PostgreSQL 17")
    with database.service_session("ended") as conn:
        conn.execute(f"set {limit} = '50ms'; begin".encode())
        ended = "select not exists (select from pg_stat_activity where application_name = 'ended')"
        wait_until(lambda: database.value(ended))

        with pytest.raises(ConnectionLost):
            read_clock(conn)


def test_the_clock_is_read_to_the_second_whatever_numbers_look_like(database: Database) -> None:
    """A database may have its floats with few digits."""
    with database.session() as conn:
        conn.execute("set extra_float_digits = -15")

        assert read_clock(conn) == pytest.approx(time.time(), abs=60)


def test_a_service_that_loses_a_deadlock_goes_on_and_no_event_is_blamed(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """With somebody who writes into both of its tables, in the other order."""
    lose_deadlocks(database)
    database = database.with_settings(max_attempts=1)
    expiries, failed, embedder = counters.lease_expiries, counters.failed_attempts, TinyEmbedder()
    embedder.may_run.clear()
    with serving(database, embedder), database.session() as owner:
        database.insert("a")
        wait_until(lambda: database.leased() == 1)
        owner.execute("set deadlock_timeout = '1min'")
        owner.execute("begin")
        owner.execute(_EMBED_BY_HAND)
        embedder.may_run.set()
        wait_until(lambda: database.waits("listener-work"))

        # In one message: what it holds it holds no longer when the service is there again.
        owner.execute("update listener.queue set queued_at = queued_at; commit")

        database.wait_for_rest()
        assert database.value("select last_value from listener.worker_token") == 2
    assert was_lost(caplog, "DeadlockDetected")
    assert (counters.lease_expiries, counters.failed_attempts) == (expiries, failed)
    database.assert_invariant()


_EMBED_BY_HAND = """
insert into public.event_embeddings (event_id, embedding, model, content_hash)
select e.id, array_fill(0.1, array[384])::vector, 'by hand', '\\x' from public.iot_events e
"""


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
    with serving(database), serving(database):
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


def test_a_standby_is_waited_for_until_it_is_promoted(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """LISTEN raises there; after the promotion the service serves."""
    primary = make_server("wal_level=replica")
    with installed(primary) as database:
        database.insert("written on the primary")
    become_standby(primary)
    with reconnected(database) as seen, serving(database):
        wait_until(lambda: was_lost(caplog, "the server is read-only"))
        assert seen.embedded() == {}
        seen.rows("select pg_promote()")

        wait_until(seen.embedded)


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
