"""What the README says could fail or delay a writer does so, and its remedy is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import psycopg
import pytest

from listener.queue import Queue
from tests.harness import (
    Database,
    TinyEmbedder,
    is_asleep,
    serve_once,
    serving,
    wait_until,
)
from tests.own_server import MakeServer, full_notify_queue, installed
from tests.test_docs import README
from tests.test_install import install_in
from tests.test_writers_are_safe import STRICT, UPDATE, impatient, insert, partition, prepare

SWITCH = "; ".join(
    f"alter table public.iot_events disable trigger listener_{verb}"
    for verb in ("inserted", "updated")
)


@STRICT
def test_a_strict_writer_is_told_to_retry_a_delete_of_what_was_embedded_meanwhile(
    database: Database, level: str
) -> None:
    """As the README says; the retry succeeds."""
    database.insert("old")
    with database.service_session() as work, database.session() as writer:
        queue = Queue(work, database.settings, None)
        writer.execute(f"begin isolation level {level}".encode())
        writer.execute("select 1")
        claim = queue.claim(10)
        assert claim is not None
        events = queue.read(claim)
        assert queue.write(claim.lease, events, list(TinyEmbedder().encode(["old"])), "model")

        with pytest.raises(psycopg.errors.SerializationFailure):
            writer.execute("delete from public.iot_events")

        writer.execute("rollback")
        writer.execute("delete from public.iot_events")
    with serving(database):
        database.wait_for_rest()
    database.assert_invariant()


def test_a_prepared_transaction_is_refused_only_where_it_had_to_notify(database: Database) -> None:
    """While the service sleeps; never with NOTIFY=never."""
    with serving(database):
        wait_until(lambda: is_asleep(database))
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="cannot PREPARE"):
            prepare(database, "refused")
        database.rows("rollback")
    # The server frees a session's locks a moment after the client is gone.
    wait_until(lambda: not is_asleep(database))

    with serving(database.with_settings(notify="never", poll_seconds=0.2)):
        prepare(database, "embedded")
        database.rows("commit prepared 'one'")
        wait_until(database.embedded)


def test_a_partition_goes_once_its_vectors_are_deleted(database: Database) -> None:
    """By the three statements of the README; the service goes on with the others."""
    partition(database)
    database.rows("insert into public.iot_events values (1, 'old'), (11, 'new')")
    # A sweep reads both tables too, and may be who loses a deadlock, or makes us lose it.
    with serving(database.with_settings(backfill_last_n=0)):
        wait_until(lambda: set(database.embedded()) == {1, 11})
        with pytest.raises(psycopg.errors.ForeignKeyViolation, match="removing partition"):
            database.rows("alter table public.iot_events detach partition public.early")
        with pytest.raises(psycopg.errors.DependentObjectsStillExist, match="cannot drop table"):
            database.rows("drop table public.early")

        for statement in (
            "delete from public.event_embeddings m using public.early p where m.event_id = p.id",
            "alter table public.iot_events detach partition public.early",
            "drop table public.early",
        ):
            assert statement.replace("early", "PARTITION") in README
            database.rows(statement)

        database.rows("insert into public.iot_events values (12, 'newer')")
        wait_until(lambda: set(database.embedded()) == {11, 12})
        database.wait_for_rest()
    database.assert_invariant()


@pytest.fixture
def small_notify_queue(database: Database, make_server: MakeServer) -> Iterator[Database]:
    """An installed database on a server whose NOTIFY queue is soon full."""
    if database.conn.info.server_version < 170000:
        pytest.skip("before PostgreSQL 17 the NOTIFY queue holds 8 GB")
    server = make_server("max_notify_queue_pages=64")
    with installed(server, replace(database.owner, poll_seconds=0.5)) as made:
        yield made


def test_a_full_notify_queue_refuses_no_writer(small_notify_queue: Database) -> None:
    """The triggers are silent from half on; the sleeping service finds the event by its poll."""
    database = small_notify_queue
    usage = "select pg_notification_queue_usage()"
    with serving(database):
        wait_until(lambda: is_asleep(database))
        with full_notify_queue(database) as deaf:
            wait_until(lambda: is_asleep(database))

            database.insert("queue is full")
            database.rows("update public.iot_events set message = 'queue is still full'")

            assert database.value(usage) > 0.9
            wait_until(database.embedded)
            database.wait_for_rest()
            deaf.close()
            wait_until(lambda: database.value(usage) < 0.5)


def test_a_service_started_at_a_full_notify_queue_is_none_behind_a_pooler(
    small_notify_queue: Database,
) -> None:
    """Its own NOTIFY is not sent, which says nothing about its session."""
    database = small_notify_queue
    with full_notify_queue(database), serving(database):
        wait_until(lambda: is_asleep(database))

        assert database.value("select count(*) from listener.live_worker") == 1


@contextmanager
def locked(database: Database) -> Iterator[None]:
    with database.session() as migration, migration.transaction():
        migration.execute("lock table listener.change in access exclusive mode")
        yield


def damaged(statement: str) -> Callable[[Database], AbstractContextManager[None]]:
    @contextmanager
    def damage(database: Database) -> Iterator[None]:
        database.rows(statement)
        yield

    return damage


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (locked, psycopg.errors.LockNotAvailable),
        (damaged("drop table listener.change cascade"), psycopg.errors.UndefinedTable),
        (
            damaged("revoke all on listener.change from listener_owner"),
            psycopg.errors.InsufficientPrivilege,
        ),
        (
            damaged(
                "create or replace function listener.queue_inserted() returns trigger "
                "language plpgsql as $$ begin raise exception 'broken'; end $$"
            ),
            psycopg.errors.RaiseException,
        ),
    ],
)
def test_a_queue_out_of_order_fails_writers_until_the_triggers_are_switched_off(
    database: Database,
    damage: Callable[[Database], AbstractContextManager[None]],
    error: type[psycopg.Error],
) -> None:
    """As the README says; install and a sweep then find what was written meanwhile."""
    with damage(database), impatient(database) as writer:
        with pytest.raises(error):
            insert(writer, "refused")

        writer.execute(SWITCH.encode())

        written = {insert(writer, "a"), insert(writer, "b")}
        writer.execute(UPDATE, ["c", min(written)])
    install_in(database.conn)
    written.add(insert(database.conn, "queued again"))
    serve_once(database)
    assert set(database.embedded()) == written
    database.assert_invariant()
