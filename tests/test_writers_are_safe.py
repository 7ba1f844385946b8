"""The writer never fails or waits because of the service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from listener.config import Settings
from listener.database import Connection, connect
from listener.html_report import render_report
from listener.queue import Queue
from listener.search import describe, nearest
from listener.status import count_pending, read_status
from tests.harness import Database, TinyEmbedder, is_asleep, serve_once, serving, wait_until
from tests.test_install import install_in

INSERT = (
    "insert into public.iot_events (device_id, event_type, severity, message) "
    "values ('pump-1', 'status', 'info', %s) returning id"
)
UPDATE = "update public.iot_events set message = %s where id = %s"
DELETE = "delete from public.iot_events where id = %s"


def insert(conn: Connection, message: str) -> int:
    row = conn.execute(INSERT, [message]).fetchone()
    assert row is not None
    return int(row[0])


@contextmanager
def impatient(database: Database) -> Iterator[Connection]:
    """A writer that fails if it has to wait for a lock."""
    with database.session() as writer:
        # Longer than a busy machine holds up a session of the service that has rows locked.
        writer.execute("set lock_timeout = '5s'")
        yield writer


# --- what the service does -----------------------------------------------------------------------


def test_a_large_update_after_a_small_one_takes_no_time_for_each_pair_of_rows(
    database: Database,
) -> None:
    """The trigger's plan is made once a session, for as many rows as the first update has."""
    database.insert(*map(str, range(20_000)))
    with database.session() as writer:
        writer.execute("update public.iot_events set device_id = 'other' where id = 1")
        # Pair by pair it takes half a minute.
        writer.execute("set statement_timeout = '10s'")
        writer.execute("update public.iot_events set message = message || '.'")

    assert database.value("select count(*) from listener.change") == 40_000


_WAITING = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and pid = %s"


@pytest.mark.parametrize(
    "statement",
    [
        "select * from listener.sweep('m', null, 10, null)",
        "select * from listener.coverage('m', 10)",
    ],
)
def test_a_truncate_that_waits_for_a_writer_meets_no_lock_of_ours_in_another_order(
    database: Database, statement: str
) -> None:
    """It waits for iot_events, and then wants event_embeddings: so do we, else one would fail."""
    with (
        database.session() as writer,
        database.session() as truncating,
        database.service_session() as service,
        ThreadPoolExecutor(2) as threads,
    ):
        truncating.execute("set deadlock_timeout = '100ms'")
        with writer.transaction():
            insert(writer, "a")
            truncated = threads.submit(truncating.execute, "truncate public.iot_events cascade")
            wait_until(lambda: database.value(_WAITING, truncating.info.backend_pid))
            looked = threads.submit(service.execute, statement.encode())
            wait_until(lambda: database.value(_WAITING, service.info.backend_pid))

        truncated.result(10)
        looked.result(10)


def test_a_writer_is_not_held_up_by_a_batch_that_is_being_encoded(database: Database) -> None:
    """Insert, update, delete and truncate of events that a worker has claimed."""
    embedder = TinyEmbedder()
    updated, deleted, _ = database.insert("a", "b", "c")
    embedder.may_run.clear()
    with serving(database, embedder), impatient(database) as writer:
        wait_until(lambda: all(row.is_claimed for row in database.queue()))

        insert(writer, "d")
        writer.execute(UPDATE, ["changed", updated])
        writer.execute(DELETE, [deleted])
        embedder.may_run.set()
        database.wait_for_rest()

        assert len(database.embedded()) == 3
        database.assert_invariant()
        embedder.may_run.clear()
        insert(writer, "e")
        wait_until(lambda: any(row.is_claimed for row in database.queue()))
        writer.execute("truncate public.iot_events cascade")
        embedder.may_run.set()

        wait_until(lambda: database.queue() == [])


def test_writers_of_different_events_never_wait_for_each_other(database: Database) -> None:
    """What the triggers share between two open transactions is no lock."""
    new: set[int] = set()
    ids = database.insert("a", "b", "c", "d")
    with (
        impatient(database) as one,
        impatient(database) as two,
        one.transaction(),
        two.transaction(),
    ):
        for writer, mine in ((one, ids[0]), (two, ids[1]), (one, ids[2]), (two, ids[3])):
            new.add(insert(writer, "new"))
            writer.execute(UPDATE, ["changed", mine])
        one.execute(DELETE, [ids[0]])
        two.execute(DELETE, [ids[1]])

    with serving(database):
        database.wait_for_rest()
    assert set(database.embedded()) == {*ids[2:], *new}


def test_writers_that_do_not_deadlock_by_themselves_do_not_deadlock_with_us(
    database: Database,
) -> None:
    """The same events in opposite order, by writers that lock them first, and a busy service."""
    ids = database.insert(*map(str, range(20)))

    def write(order: list[int]) -> None:
        with database.session() as writer:
            for number in range(50):
                with writer.transaction():
                    writer.execute("select from public.iot_events order by id for update")
                    for event_id in order:
                        writer.execute(UPDATE, [f"text {number}", event_id])

    with serving(database.with_settings(batch_events=8)), ThreadPoolExecutor(2) as writers:
        list(writers.map(write, (ids, ids[::-1])))
        database.wait_for_rest()

    database.assert_invariant()


def test_a_writer_that_stays_in_its_transaction_holds_up_nobody(database: Database) -> None:
    """Neither other writers nor the vectors of the others' events."""
    (held,) = database.insert("held")
    with (
        serving(database),
        impatient(database) as other,
        database.session() as slow,
        slow.transaction(force_rollback=True),
    ):
        database.wait_for_rest()
        slow.execute(UPDATE, ["changed", held])
        insert(slow, "never committed")
        others = [insert(other, str(number)) for number in range(500)]

        wait_until(lambda: set(database.embedded()) == {held, *others})


def test_ids_that_commit_out_of_order_are_all_embedded(database: Database) -> None:
    """And one that is rolled back is never seen."""
    with serving(database), database.session() as slow:
        wait_until(lambda: is_asleep(database))
        with slow.transaction():
            first = insert(slow, "first id, last commit")
            with database.conn.transaction(force_rollback=True):
                insert(database.conn, "rolled back")
            last = insert(database.conn, "last id, first commit")
            wait_until(lambda: set(database.embedded()) == {last})
        wait_until(lambda: set(database.embedded()) == {first, last})

    assert database.queue() == []


def test_an_event_may_get_another_id(database: Database) -> None:
    """After it was embedded as before; its writer is not refused, and no sweep is needed."""
    database.insert("a")
    database.rows("alter table public.iot_events alter id drop identity")
    with serving(database.with_settings(backfill_last_n=0)):
        database.wait_for_rest()
        database.rows("update public.iot_events set id = 1000")
        database.wait_for_rest()
        assert set(database.embedded()) == {1000}
    database.assert_invariant()

    database.rows("delete from public.event_embeddings")
    database.rows("update public.iot_events set id = 2000")

    assert [row.event_id for row in database.queue()] == [1000, 2000]
    serve_once(database)
    database.assert_invariant()


@pytest.mark.parametrize("state", ["pending", "parked"])
def test_an_event_that_takes_over_the_id_of_one_that_reads_the_same_is_embedded(
    database: Database, state: str
) -> None:
    """The vector went with the other to its new id; what waits or is parked has the old one."""
    [first] = database.insert("a")
    serve_once(database)
    [second] = database.insert("a")
    database.rows("alter table public.iot_events alter id drop identity")
    if state == "parked":
        database.park(second)

    database.rows("update public.iot_events set id = id - 1")

    serve_once(database.with_settings(backfill_last_n=0))
    assert set(database.embedded()) == {first - 1, first}
    database.assert_invariant()


def test_without_any_service_events_only_queue(database: Database) -> None:
    """A day's outage costs the writers nothing and fills no NOTIFY queue; then all are embedded."""
    with database.session() as ear, database.session() as writer, writer.cursor() as cursor:
        ear.execute("listen listener")
        cursor.executemany(INSERT, [(str(number % 50),) for number in range(10_000)])

        ear.execute("select 1")
        assert list(ear.notifies(timeout=0.1)) == []
    assert database.value("select count(*) from listener.change") == 10_000
    with serving(database):
        database.wait_for_rest(60)
    assert len(database.embedded()) == 10_000


# --- isolation levels ----------------------------------------------------------------------------

STRICT = pytest.mark.parametrize("level", ["repeatable read", "serializable"])


@STRICT
def test_inserts_at_a_strict_isolation_level_are_never_refused_because_of_us(
    database: Database, level: str
) -> None:
    """While the service claims and acknowledges what came after their snapshots."""

    def write(number: int) -> None:
        with database.session() as writer:
            writer.execute(f"set default_transaction_isolation = '{level}'".encode())
            for _ in range(100):
                with writer.transaction():
                    # No read of iot_events: at serializable those fail each other without us, too.
                    writer.execute("select 1")
                    insert(writer, f"text {number}")

    with serving(database), ThreadPoolExecutor(2) as writers:
        list(writers.map(write, (1, 2)))
        database.wait_for_rest()

    assert len(database.embedded()) == 200
    database.assert_invariant()


@STRICT
@pytest.mark.parametrize("step", ["claimed", "read", "stored"])
def test_an_update_at_a_strict_level_succeeds_whatever_the_service_does_with_the_event(
    database: Database, level: str, step: str
) -> None:
    """A change is only appended; what the snapshot doesn't show of the queue is in nobody's way."""
    database.insert("old", "parked")
    with database.service_session() as work, database.session() as writer:
        queue = Queue(work, database.settings, None)
        with writer.transaction():
            writer.execute(f"set transaction isolation level {level}".encode())
            writer.execute("select 1")
            claim = queue.claim(1)
            assert claim is not None
            if step != "claimed":
                events = queue.read(claim)
            if step == "stored":
                vectors = list(TinyEmbedder().encode(["old"]))
                assert queue.write(claim.lease, events, vectors, "model")

            writer.execute("update public.iot_events set message = 'new'")
            if step != "stored":
                writer.execute("delete from public.iot_events where id = 1")

    with serving(database):
        database.wait_for_rest()
    database.assert_invariant()


READS: dict[str, Callable[[Connection, Settings], object]] = {
    "status": read_status,
    "report": lambda conn, settings: render_report(conn, settings, 10),
    "show": lambda conn, _: describe(conn, "1"),
    "search": lambda conn, _: nearest(conn, np.zeros(384, np.float32), "model", 10),
    "backfill": lambda conn, _: count_pending(conn),
}


@pytest.mark.parametrize("command", READS)
def test_what_a_command_reads_fails_no_writer_at_serializable(
    static: Database, command: str
) -> None:
    """At that level, too, it would make the third of a ring in which one must give way."""
    static.insert("event")
    static.rows("create table public.other as select 1 as n")
    static.rows(
        f'alter database "{static.conn.info.dbname}" '
        "set default_transaction_isolation = serializable"
    )
    with (
        static.session() as writer,
        static.session() as other,
        connect(static.owner, "listener-test") as conn,
    ):
        writer.execute("begin")
        writer.execute("select n from public.other")
        other.execute("update public.other set n = n + 1")

        READS[command](conn, static.settings)

        insert(writer, "text")
        writer.execute("commit")


def test_a_lock_on_the_queue_holds_up_no_writer(database: Database) -> None:
    """Only the service waits for it; its statements are given up and come again."""
    with database.session() as migration, migration.transaction(), impatient(database) as writer:
        migration.execute("lock table listener.queue in access exclusive mode")

        event_id = insert(writer, "a")
        writer.execute(UPDATE, ["b", event_id])
        writer.execute(DELETE, [event_id])


def test_who_holds_a_vector_holds_up_no_other_event_and_no_writer(database: Database) -> None:
    """As somebody who deletes vectors and then their events, in one transaction by hand."""
    held, mate = database.insert("a", "b")
    with serving(database), database.session() as cleaner, impatient(database) as writer:
        wait_until(lambda: len(database.embedded()) == 2)
        before = database.embedded()[mate]
        cleaner.execute("begin")
        cleaner.execute("delete from public.event_embeddings where event_id = %s", [held])

        database.rows("update public.iot_events set message = message || ' again'")

        wait_until(lambda: (database.embedded()[mate] != before).any())
        writer.execute(DELETE, [mate])
        cleaner.execute(DELETE.encode(), [held])
        cleaner.execute("commit")
        database.wait_for_rest()
    database.assert_invariant()


# --- two-phase commit and partitions --------------------------------------------------------------


def prepare(database: Database, message: str) -> None:
    database.rows("begin")
    insert(database.conn, message)
    database.rows("prepare transaction 'one'")


def test_a_transaction_prepared_before_the_service_slept_is_embedded_when_it_commits(
    database: Database,
) -> None:
    """It passed the gate in silence, so the service doesn't sleep while it is prepared."""
    prepare(database, "a")
    with serving(database):
        others = database.insert("b")
        wait_until(lambda: set(database.embedded()) == set(others))
        assert not is_asleep(database)

        database.rows("commit prepared 'one'")

        wait_until(lambda: len(database.embedded()) == 2)


def partition(database: Database) -> None:
    """Another iot_events, installed, of two partitions: `early` below 10, and `part`."""
    database.rows("drop table public.iot_events, public.event_embeddings cascade")
    database.rows("drop schema listener cascade")
    database.rows(
        "create table public.iot_events (id bigint primary key, message text) "
        "partition by range (id)"
    )
    database.rows("create table early partition of public.iot_events for values from (0) to (10)")
    database.rows("create table part partition of public.iot_events default")
    install_in(database.conn)


def test_rows_written_straight_into_a_partition_are_found_by_the_sweep(
    database: Database,
) -> None:
    """A partitioned iot_events can be installed; those written by its name are queued at once."""
    partition(database)

    database.rows("insert into public.iot_events values (11, 'queued'), (12, 'deleted')")
    database.rows("insert into part values (13, 'found')")
    assert [row.event_id for row in database.queue()] == [11, 12]
    database.rows("delete from part where id = 12")
    with serving(database):
        wait_until(lambda: set(database.embedded()) == {11, 13})
        database.wait_for_rest()

    database.assert_invariant()


def test_a_merge_that_inserts_into_a_partition_and_then_updates_loses_no_update(
    database: Database,
) -> None:
    """Postgres shows the trigger the inserted row in the place of the updated ones."""
    partition(database)
    database.rows("insert into public.iot_events values (1, 'a'), (2, 'b')")
    serve_once(database)

    database.rows(
        "merge into public.iot_events e "
        "using (values (11, 'c'), (1, 'd'), (2, 'e')) v (id, message) on e.id = v.id "
        "when matched then update set message = v.message "
        "when not matched then insert values (v.id, v.message)"
    )

    serve_once(database.with_settings(backfill_last_n=0))
    assert set(database.embedded()) == {1, 2, 11}
    database.assert_invariant()
