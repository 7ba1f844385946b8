"""An operator's own embedding_input may fail on events, take long, or be badly declared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from listener import queries
from listener.blame import require_input
from listener.claim import Event
from listener.counters import counters
from listener.database import Connection
from listener.errors import ConnectionLost, SchemaError, StatementTimeout, SweepGivenUp
from listener.queue import Queue
from listener.sweep import Sweep
from tests.harness import (
    Database,
    Queued,
    RunningService,
    TinyEmbedder,
    claimed,
    is_asleep,
    listener,
    serve_once,
    serving,
    store,
    wait_until,
)
from tests.misbehaviour import (
    LOSE_CONNECTION,
    SLOW,
    change_sweep,
    limit_statements,
    refuse_writes,
    replace_input,
    replace_input_in_sql,
    slow_down_writes,
)

MODEL = TinyEmbedder.fingerprint

# What a body in plpgsql comes to on a message that is "bad", by the name of the error.
FAILURES = {
    "DivisionByZero": "perform 1 / 0",
    "RaiseException": "raise exception 'no unit'",
    "DatabaseError": "raise exception 'no unit' using errcode = 'IOT01'",
    "ProgrammingError": "raise exception 'no unit' using errcode = 'PT404'",
    "AssertFailure": "assert false, 'no unit'",
    "CardinalityViolation": "perform (select n from generate_series(1, 2) n)",
    "NoDataFound": "select 'x' into strict v_text where false",
    "ExternalRoutineException": "raise external_routine_exception",
    "StatementTooComplex": "perform listener.embedding_input(event)",
    "InternalError_": "raise internal_error",
    # For which else the schema is blamed: names and statements made of what is in the event.
    "UndefinedTable": "perform event.message::regclass",
    "UndefinedObject": "perform event.message::regconfig",
    "InvalidSchemaName": "perform event.message::regnamespace",
    "InsufficientPrivilege": "raise insufficient_privilege",
    "SyntaxError": "execute 'select ' || event.message || ' from'",
    "FeatureNotSupported": "perform array_position(array[[1]], 1)",
    "ObjectNotInPrerequisiteState": "raise object_not_in_prerequisite_state",
    # For which else the server is blamed.
    "OutOfMemory": "raise out_of_memory",
    "IoError": "raise io_error",
    "UndefinedFile": "raise undefined_file",
    "DataCorrupted": "raise data_corrupted",
}


@pytest.fixture
def service_session(database: Database) -> Iterator[Connection]:
    """As the service's, but that a statement may take a second only."""
    with database.service_session() as conn:
        conn.execute(queries.SERVICE_SESSION)
        conn.execute("set statement_timeout = '1s'")
        yield conn


@pytest.fixture
def queue(database: Database, service_session: Connection) -> Queue:
    """The queue as a worker with a session of its own sees it."""
    return Queue(service_session, database.settings, worker=1)


@pytest.mark.parametrize(
    ("name", "language"),
    [
        *((name, "plpgsql") for name in (*FAILURES, "FunctionExecutedNoReturnStatement")),
        ("DivisionByZero", "sql"),
    ],
)
def test_an_event_that_it_fails_on_is_parked_and_its_mates_are_stored(
    database: Database, name: str, language: str
) -> None:
    """Whatever the error: no writer fails, no connection is given up, no process ends."""
    if language == "sql":
        replace_input_in_sql(database)
    else:
        # Without a `return` on its way a function of plpgsql fails at its end.
        replace_input(database, FAILURES.get(name, "null"))
    database = database.with_settings(max_attempts=1)

    first, bad, *more = database.insert("first", "bad", "second", "third")
    (edited,) = database.insert("good, then bad")
    with serving(database):
        wait_until(lambda: len(database.embedded()) == 4)
        database.rows("update public.iot_events set message = 'bad' where id = %s", edited)
        wait_until(lambda: len(database.parked()) == 2)
        database.wait_for_rest()
        assert database.value("select last_value from listener.worker_token") == 1

    assert {row.event_id for row in database.queue()} == {bad, edited}
    assert all(row.error.startswith(f"embedding_input: {name}") for row in database.queue())
    # Of the text before, until the event can be embedded again.
    assert set(database.embedded()) == {first, *more, edited}


def test_an_update_on_which_it_fails_is_queued_whatever_the_writers_session_takes_for_null(
    database: Database,
) -> None:
    """And the writer is not refused."""
    (event_id,) = database.insert("good")
    database.forget_queue()
    replace_input(database, "raise exception 'no'")
    database.rows("set array_nulls = off")

    database.rows("update public.iot_events set message = 'bad'")

    assert [row.event_id for row in database.queue()] == [event_id]


def test_a_right_that_is_missing_is_no_events_fault(database: Database, queue: Queue) -> None:
    """Nor is anything else of which the statement fails without an event as well."""
    ids = database.insert("a", "b")
    claim = claimed(queue)
    events = queue.read(claim)
    database.rows("revoke insert on listener.embedding from listener_worker")

    with pytest.raises(SchemaError, match="a right is missing"):
        store(queue, claim, events)

    assert database.queue() == [Queued(event_id, attempts=1, is_claimed=True) for event_id in ids]


def test_one_that_calls_what_it_does_not_find_ends_the_service_and_parks_nothing(
    database: Database,
) -> None:
    """The service calls it with an empty search path, whatever that of the session is."""
    database.rows(
        "create function public.clean(text) returns text language sql as $$ select trim($1) $$"
    )
    database.rows(
        "create or replace function listener.embedding_input(event public.iot_events) "
        "returns text language plpgsql stable as $$ begin return clean(event.message); end $$"
    )
    database.insert("a")

    with pytest.raises(SchemaError, match=r"can't be evaluated \(function clean"):
        serve_once(database.with_settings(max_attempts=1))

    assert database.value("select parked from listener.status") == 0


@pytest.mark.parametrize("condition", ["io_error", "disk_full", "out_of_memory"])
def test_a_server_that_takes_no_vector_is_no_events_fault(
    database: Database, queue: Queue, condition: str
) -> None:
    """Though to write nothing works; the same error where events are read may be one event's."""
    ids = database.insert("a", "b")
    claim = claimed(queue)
    events = queue.read(claim)
    refuse_writes(database, condition)

    with pytest.raises(ConnectionLost, match=condition):
        store(queue, claim, events)

    assert database.queue() == [Queued(event_id, attempts=1, is_claimed=True) for event_id in ids]


def test_a_schema_that_is_gone_is_no_fault_of_it(database: Database) -> None:
    """No other columns would help."""
    database.rows("drop schema listener cascade")

    with pytest.raises(SchemaError, match=r"^the database lacks what the listener needs"):
        require_input(database.conn)


@pytest.mark.parametrize("deed", ["raise 'no message'", "perform pg_catalog.pg_sleep(9)"])
def test_one_that_only_fails_where_there_is_no_event_is_in_order(
    database: Database, service_session: Connection, deed: str
) -> None:
    """It is tried on a row of nulls, which no event is."""
    database.rows(
        "create or replace function listener.embedding_input(event public.iot_events) "
        "returns text language plpgsql stable set search_path = '' as "
        f"$$ begin if event.id is null then {deed}; end if; return event.message; end $$"
    )

    require_input(service_session)


def test_a_column_that_gets_another_type_fails_no_event(database: Database) -> None:
    """A session would go on with the plan of embedding_input that it has."""
    failed = counters.failed_attempts
    with serving(database):
        database.insert("before")
        wait_until(lambda: len(database.embedded()) == 1)
        database.rows("alter table public.iot_events alter severity type varchar(50)")
        database.insert("after")
        wait_until(lambda: len(database.embedded()) == 2)
        database.wait_for_rest()

        assert counters.failed_attempts == failed
        assert database.value("select last_value from listener.worker_token") == 1


def test_a_column_that_is_dropped_ends_a_service_that_runs(database: Database) -> None:
    """Its sessions have evaluated embedding_input, and don't go on with what they know of it."""

    def drop_a_column(service: RunningService) -> None:
        database.insert("before")
        wait_until(lambda: len(database.embedded()) == 1)
        database.rows("alter table public.iot_events drop severity")
        database.rows(
            "insert into public.iot_events (device_id, event_type, message) values ('p', 't', 'm')"
        )
        service.thread.join(20)

    with pytest.raises(SchemaError, match="can't be evaluated"), serving(database) as service:
        drop_a_column(service)

    assert database.value("select count(*) from public.event_embeddings") == 1
    assert database.value("select parked from listener.status") == 0


def test_an_extension_that_goes_parks_nothing(database: Database) -> None:
    """A session that has prepared its statements gets an internal error for each event."""

    def drop_the_extension(service: RunningService) -> None:
        for number in range(8):
            database.insert(str(number))
            database.wait_for_rest()
        database.rows("drop extension vector cascade")
        database.insert("after")
        service.thread.join(20)

    with pytest.raises(SchemaError, match="listener install"), serving(database) as service:
        drop_the_extension(service)

    assert [(row.is_parked, row.error) for row in database.queue()] == [(False, None)]


def test_an_event_that_it_takes_too_long_on_is_parked_and_its_mates_are_stored(
    database: Database, queue: Queue
) -> None:
    """The server gives the statement up; smaller ones find the event."""
    replace_input(database, "perform pg_catalog.pg_sleep(9)")
    bad, *good = database.insert("bad", "first", "second")
    claim = claimed(queue)

    store(queue, claim, queue.read(claim))

    assert set(database.embedded()) == set(good)
    (row,) = database.queue()
    assert (row.event_id, row.attempts) == (bad, 1)
    assert "QueryCanceled" in row.error


def test_events_that_together_take_too_long_are_written_in_parts(
    database: Database, queue: Queue
) -> None:
    """As into a large vector index on a slow disk; else they would be encoded again and again."""
    slow_down_writes(database, 0.2)
    ids = database.insert(*map(str, range(8)))
    claim = claimed(queue)

    assert sorted(store(queue, claim, queue.read(claim)), key=str) == ids


def test_an_event_whose_text_is_another_each_time_is_parked(database: Database) -> None:
    """It would be encoded again and again, and never be stored."""
    replace_input(database, "return event.message || clock_timestamp()")
    database = database.with_settings(max_attempts=2, retry_seconds=0.01)

    bad, good = database.insert("bad", "good")
    with serving(database):
        wait_until(database.parked)

    (row,) = database.queue()
    assert (row.event_id, row.attempts, row.is_parked) == (bad, 2, True)
    assert "reads differently" in row.error
    assert set(database.embedded()) == {good}


def test_a_transaction_time_out_of_the_database_ends_no_session(database: Database) -> None:
    """The service has its own limits; one that ends the session would end each that follows."""
    if database.conn.info.server_version < 170000:
        pytest.skip("since PostgreSQL 17")
    replace_input(database, "perform pg_catalog.pg_sleep(0.4); return event.message")
    database.rows(f"alter database {database.conn.info.dbname} set transaction_timeout = '200ms'")

    database.insert("bad")
    with serving(database):
        database.wait_for_rest()

        assert len(database.embedded()) == 1
        assert database.value("select last_value from listener.worker_token") == 1


def test_a_lock_that_is_waited_for_fails_no_event(
    database: Database, service_session: Connection, queue: Queue
) -> None:
    """It is no event's fault, however long somebody holds it, and no matter if nothing is new."""
    service_session.execute("set lock_timeout = '100ms'")
    database.insert("an event")

    with database.session() as migration, migration.transaction():
        migration.execute("lock table public.iot_events in access exclusive mode")
        claim = claimed(queue)
        assert queue.claim(1) is None
        with pytest.raises(ConnectionLost):
            queue.read(claim)

    assert len(store(queue, claim, queue.read(claim))) == 1


def test_behind_a_pooler_what_takes_too_long_fails_no_event(
    database: Database, service_session: Connection
) -> None:
    """Without limits of the service's own, it may have waited for a lock."""
    queue = Queue(service_session, database.settings, worker=None)
    (event_id,) = database.insert("an event")
    claim = claimed(queue)
    events = queue.read(claim)
    service_session.execute("set statement_timeout = '100ms'")

    with database.session() as migration, migration.transaction():
        migration.execute("lock table public.event_embeddings in share mode")
        with pytest.raises(StatementTimeout):
            store(queue, claim, events)

    assert database.queue() == [Queued(event_id, attempts=1, is_claimed=True)]


@pytest.mark.usefixtures("quick_reconnects")
def test_an_event_over_which_the_connection_is_lost_is_parked_and_its_mates_are_stored(
    database: Database,
) -> None:
    """Each time that it is read."""
    replace_input(database, LOSE_CONNECTION)
    bad, *mates = database.insert("bad", "a", "b")

    with serving(database.with_settings(backfill_last_n=0, max_attempts=3)):
        mates += database.insert("c")
        wait_until(lambda: database.parked() == [bad])
        wait_until(lambda: database.embedded().keys() == set(mates))


@pytest.mark.usefixtures("quick_reconnects")
def test_an_event_that_loses_the_connection_of_a_service_that_had_nothing_to_do_is_parked(
    database: Database,
) -> None:
    """Claimed together with its text it would leave no trace, and lose each that follows."""
    replace_input(database, LOSE_CONNECTION)
    database.insert("found by the sweep")
    database.forget_queue()

    with serving(database.with_settings(max_attempts=3)):
        # There was nothing to do, or nothing would have been swept.
        wait_until(database.embedded)
        (bad,) = database.insert("bad")

        wait_until(lambda: database.parked() == [bad])


@pytest.mark.usefixtures("quick_reconnects")
def test_an_event_that_is_in_hand_while_the_connection_is_lost_over_another_is_no_suspect(
    database: Database,
) -> None:
    """Nothing was asked of the database for it."""
    replace_input(database, LOSE_CONNECTION)
    database = database.with_settings(batch_events=1, max_attempts=3)
    embedder = TinyEmbedder()
    embedder.may_run.clear()
    with serving(database, embedder):
        wait_until(lambda: is_asleep(database))
        beside, bad = database.insert("beside", "bad")
        wait_until(lambda: database.parked() == [bad])
        attempts = [row.attempts for row in database.queue() if row.event_id == beside]
        embedder.may_run.set()
        wait_until(lambda: beside in database.embedded())

    assert attempts == [1]


@pytest.mark.usefixtures("quick_reconnects")
@pytest.mark.parametrize("on_bad", [LOSE_CONNECTION, "perform pg_catalog.pg_sleep(9)"])
def test_a_sweep_gets_past_an_event_that_loses_the_connection_or_takes_too_long(
    database: Database, monkeypatch: pytest.MonkeyPatch, on_bad: str
) -> None:
    """It is queued without a look at its text, and parked; what is older is swept, too."""
    limit_statements(monkeypatch, "0.5s")
    older, bad, _ = database.insert("older", "bad", "newer")
    serve_once(database)
    replace_input(database, on_bad)

    with serving(database.with_settings(max_attempts=3)):
        wait_until(lambda: database.parked() == [bad])
        wait_until(lambda: content_hash(database, older) == Event(older, 1, "older").content_hash)


def content_hash(database: Database, event_id: int) -> bytes:
    """Of the text that its embedding is of."""
    found = database.value(
        "select content_hash from public.event_embeddings where event_id = %s", event_id
    )
    assert isinstance(found, bytes)
    return found


def test_a_sweep_asks_for_no_text_of_an_event_that_waits_or_has_no_embedding(
    database: Database, queue: Queue
) -> None:
    """A first backfill is done without, and one that was parked is left alone."""
    replace_input(database, LOSE_CONNECTION)
    parked, new = database.insert("bad", "bad")
    database.park(parked)
    database.rows("delete from listener.change")

    page = queue.sweep(MODEL, None, 10)

    assert (page.scanned, page.queued) == (2, 1)
    assert [row.event_id for row in database.queue() if not row.is_parked] == [new]
    assert database.rows("select * from listener.coverage(%s, 10)", MODEL) == [(2, 0)]


def test_a_sweep_of_slow_events_takes_smaller_pages(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that takes too long would be begun again for ever; and new events wait for it."""
    caplog.set_level("INFO", "listener")
    ids = database.insert(*map(str, range(60)))
    serve_once(database)
    limit_statements(monkeypatch, "1s")
    replace_input(database, "null; end if; if pg_catalog.pg_sleep(0.02) is null then null")
    caplog.clear()

    with serving(database.with_settings(backfill_last_n=100)):
        last = Event(ids[0], 1, "0").content_hash
        wait_until(lambda: content_hash(database, ids[0]) == last)
        assert database.value("select last_value from listener.worker_token") == 2

    pages = [r.__dict__["fields"]["scanned"] for r in caplog.records if r.msg == "sweep_queued"]
    assert sum(pages) == len(ids)
    # A quarter of a second at 20 ms each.
    assert max(pages[1:]) <= 13


def test_a_sweep_whose_pages_take_as_long_whatever_their_size_takes_large_ones(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where all events are sorted for each: a page of one event would take as long."""
    caplog.set_level("INFO", "listener")
    monkeypatch.setattr("listener.sweep._PAGE", 64)
    monkeypatch.setattr("listener.sweep._PAGE_SECONDS", 0.05)
    change_sweep(database, "true", "perform pg_sleep(0.4)")
    database.insert(*map(str, range(64 * 5)))
    database.forget_queue()

    with serving(database):
        wait_until(lambda: len(database.embedded()) == 64 * 5)

    pages = [r.__dict__["fields"]["scanned"] for r in caplog.records if r.msg == "sweep_queued"]
    assert len(pages) <= 12
    assert pages.count(64) >= 2


@pytest.mark.parametrize("deed", [SLOW, "raise data_corrupted", "raise invalid_datetime_format"])
def test_a_sweep_that_fails_whatever_it_reads_is_given_up_until_the_next(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    deed: str,
) -> None:
    """Begun again at once it would fail again, for ever; the connection is as good as before."""
    limit_statements(monkeypatch, "0.5s")
    change_sweep(database, "true", deed)

    with serving(database.with_settings(backfill_last_n=4)):
        wait_until(lambda: any(r.msg == "sweep_given_up" for r in caplog.records))
        (event_id,) = database.insert("good")
        wait_until(lambda: event_id in database.embedded())

        assert database.value("select last_value from listener.worker_token") == 1


def test_run_once_fails_where_its_sweep_is_given_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer would pass for fine, while events of the last N were never looked at."""
    limit_statements(monkeypatch, "0.5s")
    change_sweep(database, "true")
    (event_id,) = database.insert("good")

    with pytest.raises(SweepGivenUp, match=r"after 0 of the last 4 events \(QueryCanceled"):
        serve_once(database.with_settings(backfill_last_n=4))

    assert event_id in database.embedded()


def test_behind_a_pooler_a_sweep_does_not_queue_what_takes_too_long(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """There the claim of it would end the session, again and again."""
    database.insert("bad")
    serve_once(database)
    replace_input(database, "perform pg_catalog.pg_sleep(9)")
    sweep = Sweep(database.settings)
    with database.service_session() as conn:
        conn.execute("set statement_timeout = '100ms'")

        while sweep.page(conn, Queue(conn, database.settings, worker=None), MODEL):
            pass

    assert caplog.messages == ["sweep_given_up"]
    assert database.queue() == []


@pytest.mark.usefixtures("quick_reconnects")
def test_a_sweep_waits_for_a_lock_and_blames_no_event(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As for the time of a `vacuum full`; it goes on where it was."""
    limit_statements(monkeypatch, "50ms", instead="6s")
    monkeypatch.setattr("listener.sweep._PAGE", 1)
    ids = database.insert("a", "b")
    database.forget_queue()

    with database.session() as other:
        other.execute("begin; lock table public.event_embeddings in access exclusive mode")
        with serving(database):
            wait_until(lambda: caplog.messages.count("connection_lost") > 3)
            other.execute("rollback")
            wait_until(lambda: len(database.embedded()) == len(ids))

    assert "sweep_given_up" not in caplog.messages


def test_a_sweep_reads_no_column_of_an_event_without_an_embedding(database: Database) -> None:
    """Nor of a table with large ones, which might be damaged, more than it needs."""
    database.rows("alter table public.iot_events add payload text")
    database.rows("alter table public.iot_events alter payload set storage external")
    database.rows(
        "insert into public.iot_events (device_id, event_type, severity, payload) "
        "select 'd', 't', 's', repeat('x', 100000) from generate_series(1, 3)"
    )
    database.forget_queue()
    with database.service_session() as conn:
        Queue(conn, database.settings, None).sweep(MODEL, None, 2)
        conn.execute("select pg_stat_force_next_flush()")

    assert len(database.queue()) == 2
    assert not database.value(
        "select sum(s.idx_scan) from pg_stat_all_tables s join pg_class c on c.oid = s.relid "
        "where c.oid = (select reltoastrelid from pg_class where relname = 'iot_events')"
    )


def test_a_sweep_that_is_given_up_drops_parked_events_that_were_deleted_all_the_same(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else they would be in sight for ever."""
    limit_statements(monkeypatch, "0.2s")
    change_sweep(database, "true")
    kept, deleted = database.insert("kept", "deleted")
    database.park(kept, deleted)

    with serving(database.with_settings(backfill_last_n=1, sweep_seconds=0.1)):
        wait_until(lambda: any(r.msg == "sweep_given_up" for r in caplog.records))
        database.rows("delete from public.iot_events where id = %s", deleted)

        wait_until(lambda: [row.event_id for row in database.queue()] == [kept])


def test_a_page_of_a_sweep_asks_for_no_text_beyond_its_end(
    database: Database, service_session: Connection
) -> None:
    """Or the event next to one that takes too long could not be swept."""
    _, newer = database.insert("bad", "newer")
    serve_once(database)
    replace_input(database, "perform pg_catalog.pg_sleep(9)")

    Queue(service_session, database.settings, None).sweep(MODEL, None, 1)

    assert [row.event_id for row in database.queue()] == [newer]


def test_the_sweep_after_one_that_was_given_up_begins_with_the_newest(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or nothing newer than where it was given up would ever be swept again."""
    limit_statements(monkeypatch, "0.2s")
    monkeypatch.setattr("listener.sweep._PAGE", 1)
    change_sweep(database, "p_from is not null")
    database.insert("older", "newer")

    with serving(database.with_settings(backfill_last_n=2, sweep_seconds=0.1)):
        wait_until(lambda: any(r.msg == "sweep_given_up" for r in caplog.records))
        with database.conn.transaction():
            (missed,) = database.insert("missed by a trigger")
            database.rows("delete from listener.change")

        wait_until(lambda: missed in database.embedded())


@pytest.mark.parametrize("name", FAILURES)
def test_a_sweep_passes_by_what_it_fails_on(database: Database, queue: Queue, name: str) -> None:
    """It is queued, and parked by the worker with the reason."""
    ids = database.insert("first", "bad", "second")
    serve_once(database)
    replace_input(database, FAILURES[name])

    page = queue.sweep(MODEL, None, 10)

    assert (page.scanned, page.queued) == (len(ids), len(ids))


def test_show_and_search_tell_of_an_event_that_it_fails_on(static: Database) -> None:
    """An operator who looks up why an event is parked is told so."""
    parked, embedded = static.insert("a", "bad")
    listener(static.settings, "run", "--once")
    static.rows("update public.iot_events set message = 'bad'")
    static.park(parked)
    replace_input(static, FAILURES["DivisionByZero"])

    shown = listener(static.settings, "show", str(parked)).stdout
    found = listener(static.settings, "search", "bad").stdout

    assert "parked after 5 attempts: why" in shown
    assert "embedding_input fails on it" in shown
    assert str(embedded) in found
    assert "embedding_input fails on it" in found


def test_check_passes_where_it_fails_on_the_next_event(static: Database) -> None:
    """Of the service's rights that says nothing, and its claim is taken back."""
    replace_input(static, FAILURES["DivisionByZero"])
    static.insert("bad")

    finished = listener(static.settings, "check")

    assert "FAIL" not in finished.stdout
    assert [row.version for row in static.queue()] == [0]


def test_one_that_is_not_declared_stable_reads_no_more_events(
    database: Database, queue: Queue, service_session: Connection
) -> None:
    """Postgres takes a function for volatile that doesn't say otherwise."""
    replace_input(database, "null", volatility="volatile")
    database.rows(
        "insert into public.iot_events (device_id, event_type, severity, message) "
        "select 'd', 't', 's', n::text from generate_series(1, 2000) n"
    )
    database.rows("analyze")
    before = rows_read(database)
    claim = claimed(queue, 10)
    store(queue, claim, queue.read(claim))
    database.rows("delete from public.iot_events where id = 11")
    queue.read(claimed(queue, 1))

    service_session.close()
    assert wait_until(lambda: rows_read(database) - before) < 500


def rows_read(database: Database) -> int:
    """Rows of iot_events that were read so far, by sessions that have ended."""
    return int(
        database.value(
            "select seq_tup_read + idx_tup_fetch from pg_stat_user_tables "
            "where relname = 'iot_events'"
        )
    )
