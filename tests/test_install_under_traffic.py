"""install and uninstall while devices write: nobody fails, nobody waits long, nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psycopg
import pytest
from psycopg import errors

from listener import cli, install, patience
from listener.catalogue import read_facts
from listener.config import Settings
from listener.counters import counters
from tests.harness import (
    Database,
    NewDatabase,
    Spawn,
    is_waited_for,
    role,
    serve_once,
    serving,
    vector_of,
    wait_until,
)
from tests.test_install import install_in, uninstall_in, with_events
from tests.test_writers_are_safe import insert

# The time-out of one attempt, and room for a slow machine.
LONGEST_WAIT = "6s"
EVENTS = (
    "id bigint generated always as identity primary key, device_id text, event_type text, "
    "severity text, message text, created_at timestamptz not null default now()"
)


@dataclass
class Traffic:
    """What the writers of the background have done."""

    ids: list[int] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def write(self, database: Database) -> None:
        with database.session("device") as writer:
            writer.execute(f"set lock_timeout = '{LONGEST_WAIT}'".encode())
            while not self.stop.is_set():
                with writer.transaction():
                    self.ids.append(insert(writer, f"text {len(self.ids)}"))
                    writer.execute(
                        "update public.iot_events set message = message || '!' where id = %s",
                        [self.ids[-1]],
                    )

    def wait_for_more(self) -> None:
        """Until a good many events have come from now on."""
        goal = len(self.ids) + 50
        wait_until(lambda: len(self.ids) > goal)


@contextmanager
def traffic(database: Database) -> Iterator[Traffic]:
    """Two writers until the block ends; what they raised, the block raises."""
    devices = Traffic()
    with ThreadPoolExecutor(2) as threads:
        writers = [threads.submit(devices.write, database) for _ in range(2)]
        try:
            devices.wait_for_more()
            yield devices
        finally:
            devices.stop.set()
    for writer in writers:
        writer.result()


@contextmanager
def in_the_background(act: Callable[[], object]) -> Iterator[Future[object]]:
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(act)


def age(database: Database) -> None:
    """Make the installed objects those of an earlier version, as far as an install can tell."""
    database.rows("update listener.applied set digest = 'of an earlier version'")
    database.rows("drop index listener.queue_lane_due_at_idx")
    database.rows("alter table public.iot_events enable trigger listener_inserted")
    database.rows(
        "create or replace function listener.queue_inserted() returns trigger language plpgsql "
        "security definer set search_path = '' as $$ begin insert into listener.change (event_id) "
        "select id from new_events; perform pg_notify('listener', ''); return null; end $$"
    )


def test_an_install_under_traffic_fails_no_writer_and_misses_no_event(
    new_database: NewDatabase,
) -> None:
    """What came before is swept, what comes after is queued."""
    with new_database() as url, with_events(url, EVENTS) as database:
        with traffic(database) as devices:
            install_in(database.conn)
            before = set(devices.ids)
            devices.wait_for_more()
        assert set(devices.ids) - before <= {row.event_id for row in database.queue()}

        with serving(database):
            wait_until(lambda: set(database.embedded()) == set(devices.ids))
            database.wait_for_rest()

        database.assert_invariant()


def test_two_installs_at_once_are_one(new_database: NewDatabase) -> None:
    """The second waits for the first."""
    with new_database() as url, with_events(url, EVENTS) as database:

        def act(_: int) -> None:
            with database.session("listener-install") as conn:
                plan = install.plan_install(conn, read_facts(conn), None)
                start.wait()
                install.apply_plan(conn, plan)

        start = threading.Barrier(2)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(act, range(2)))

        assert install_in(database.conn).steps == ()


def test_an_install_waits_for_a_long_transaction_and_lets_others_write(
    new_database: NewDatabase,
) -> None:
    """It tells who holds the lock, and ends when that one does."""
    told: list[str] = []
    with new_database() as url, with_events(url, EVENTS) as database:
        plan = install.plan_install(database.conn, read_facts(database.conn), None)
        with traffic(database) as devices, database.session("old-migration") as blocker:
            pid = blocker.info.backend_pid
            blocker.execute("begin")
            insert(blocker, "never committed")
            with in_the_background(lambda: install.apply_plan(database.conn, plan, told.append)):
                try:
                    wait_until(lambda: len(told) == 2)
                    devices.wait_for_more()
                finally:
                    blocker.close()
        install.verify(database.conn)

    for line in told:
        assert f"pid {pid} (old-migration, idle in transaction for" in line
        assert "holds iot_events" in line


def test_who_holds_a_lock_in_another_database_is_not_blamed(
    database: Database, new_database: NewDatabase, template: str
) -> None:
    """A copy has tables of the same numbers, and the remedy is to end that transaction."""
    with new_database(template) as url, psycopg.connect(url) as other:
        other.execute("lock table public.iot_events in share row exclusive mode")
        old = (
            "select true from pg_stat_activity "
            "where pid = %s and clock_timestamp() - xact_start > interval '2 s'"
        )
        wait_until(lambda: database.rows(old, other.info.backend_pid))

        assert patience._holder(database.conn).startswith("its holder has ended by now")


def test_where_sessions_show_no_more_than_their_process_it_is_a_writers_that_is_named(
    database: Database,
) -> None:
    """As to a role that is no superuser; a reader, or who waits as well, is in nobody's way."""
    with (
        database.session() as reader,
        database.session() as writer,
        database.session() as waiter,
        role(database.conn, "plain") as plain,
    ):
        reader.execute("begin; select from public.iot_events")
        writer.execute("begin; lock table listener.queue in row exclusive mode")
        pid = writer.info.backend_pid
        database.rows(f"grant usage on schema listener to {plain}")
        with in_the_background(lambda: waiter.execute("truncate public.iot_events cascade")):
            try:
                wait_until(lambda: is_waited_for(database.conn, "public.iot_events"))
                database.rows(f"set role {plain}")
                found = patience._holder(database.conn)
            finally:
                database.rows("reset role")
                reader.close()

    assert found == f"pid {pid} (listener-test, in a transaction) holds listener.queue"


def gives_up(monkeypatch: pytest.MonkeyPatch, settings: Settings, command: str) -> int:
    """The exit code of a command that isn't patient."""
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.1)
    # Should it wait for ever, it fails instead.
    monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=20s")
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("REPORTS_DIR", str(settings.reports_dir))
    monkeypatch.setattr("sys.argv", ["listener", command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@contextmanager
def forgotten_transaction(database: Database) -> Iterator[None]:
    """Prepared and never ended, it holds what a writer holds."""
    database.rows("begin")
    database.rows("lock table public.iot_events in row exclusive mode")
    database.rows("prepare transaction 'forgotten'")
    try:
        yield
    finally:
        database.rows("rollback prepared 'forgotten'")


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_who_never_gets_the_lock_gives_up_and_changes_nothing(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """Exit 3 and one line that names the holder, here a forgotten prepared transaction."""
    age(database)
    before = install.plan_install(database.conn, read_facts(database.conn), None)
    with forgotten_transaction(database):
        assert gives_up(monkeypatch, database.owner, command) == 3

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("listener: no lock within")
    assert "transaction forgotten (prepared for" in line
    assert "nothing was changed" in line
    assert install.plan_install(database.conn, read_facts(database.conn), None) == before


def test_a_change_that_is_open_while_the_text_becomes_another_is_embedded(
    database: Database,
) -> None:
    """The trigger compared it as the text was; the backfill after the install must see it."""
    (event_id,) = database.insert("a")
    install_in(database.conn, ["message"])
    serve_once(database)
    with database.session("device") as writer, database.session("listener-install") as conn:
        writer.execute("begin")
        writer.execute("update public.iot_events set severity = 'critical'")
        with in_the_background(lambda: install_in(conn, ["message", "severity"])):
            wait_until(lambda: database.waits("listener-install"))
            writer.execute("commit")

    serve_once(database)

    expected = vector_of("message: a\nseverity: critical")
    assert np.allclose(database.embedded()[event_id], expected)


def test_the_text_becomes_another_once_the_write_in_hand_is_done(database: Database) -> None:
    """It compared its vectors with the text as it was."""
    with database.session("listener-work") as worker, database.session("listener-install") as conn:
        worker.execute("begin")
        worker.execute("delete from listener.queue")
        with in_the_background(lambda: install_in(conn, ["message"])):
            wait_until(lambda: database.waits("listener-install"))
            worker.execute("commit")

    assert read_facts(database.conn).triggers_right


@pytest.mark.parametrize("older", ["all of it", "the tables"])
def test_an_upgrade_takes_its_locks_in_the_order_of_the_writers(
    database: Database, older: str
) -> None:
    """One that has its event but not yet its queue row gets it; in another order both deadlock."""
    told: list[str] = []
    if older == "all of it":
        age(database)
    else:
        database.rows(
            "update listener.applied set digest = '' "
            "where file in ('001_schema.sql', '002_event_embeddings.sql')"
        )
    with (
        database.session("device") as writer,
        database.session("listener-install") as conn,
    ):
        plan = install.plan_install(conn, read_facts(conn), None)
        writer.execute("begin")
        # Where a long COPY is before its trigger fires.
        writer.execute("lock table public.iot_events in row exclusive mode")
        with in_the_background(lambda: install.apply_plan(conn, plan, told.append)):
            wait_until(lambda: database.waits("listener-install"))
            insert(writer, "a")
            writer.execute("commit")

    assert told == []
    install.verify(database.conn)


def test_an_upgrade_gives_way_before_a_worker_loses_a_deadlock_with_it(database: Database) -> None:
    """A worker that has the events goes on to the queue, which the upgrade holds."""
    age(database)
    plan = install.plan_install(database.conn, read_facts(database.conn), None)
    with (
        database.session("worker") as worker,
        database.session("listener-install") as conn,
    ):
        # Else either of the two might be the one that finds it.
        worker.execute("set deadlock_timeout = '1min'")
        worker.execute("begin")
        worker.execute("select from listener.event limit 0")
        with in_the_background(lambda: conn.execute(plan.script.encode())) as upgrade:
            wait_until(lambda: database.waits("listener-install"))
            worker.execute("delete from listener.queue")
            worker.execute("commit")

    assert isinstance(upgrade.exception(), errors.LockNotAvailable)


def test_an_install_that_loses_a_deadlock_is_tried_again(database: Database) -> None:
    """With somebody who takes the locks in another order than writers do."""
    told: list[str] = []
    with database.session("migration") as other, database.session() as conn:
        # So that it is ours that finds it.
        conn.execute("set deadlock_timeout = '10ms'")
        other.execute("set deadlock_timeout = '1min'")
        other.execute("begin")
        other.execute("lock table listener.change")

        def change() -> None:
            conn.execute("lock table public.iot_events")
            if not told:
                threads.submit(other.execute, "lock table public.iot_events; commit")
                wait_until(lambda: database.waits("migration"))
            conn.execute("lock table listener.change")

        with ThreadPoolExecutor(1) as threads:
            patience.patiently(conn, change, told.append)

    assert len(told) == 1


def test_an_install_under_a_short_time_out_of_statements_waits_for_its_locks_all_the_same(
    database: Database,
) -> None:
    """It names the holder and tries again."""
    told: list[str] = []
    with database.session("migration") as other, database.session() as conn:
        conn.execute("set statement_timeout = '1s'")
        other.execute("begin")
        other.execute("lock table public.iot_events")

        def tell(line: str) -> None:
            told.append(line)
            other.execute("commit")

        def change() -> None:
            conn.execute("lock table public.iot_events")

        patience.patiently(conn, change, tell)

    assert len(told) == 1


def test_an_upgrade_with_live_workers_loses_nothing(database: Database) -> None:
    """Every object is made again while two services claim, on one connection, and devices write."""
    reconnects = counters.reconnects
    with serving(database), serving(database), traffic(database) as devices:
        # One that came later would refuse the old trigger.
        wait_until(lambda: database.value("select count(*) from listener.worker") == 2)
        age(database)
        devices.wait_for_more()

        plan = install_in(database.conn)

        assert {step.file for step in plan.steps} >= {
            "001_schema.sql",
            "005_trigger_functions.sql",
            "007_triggers.sql",
        }
        devices.wait_for_more()
        devices.stop.set()
        wait_until(lambda: set(database.embedded()) == set(devices.ids))
        database.wait_for_rest()

    database.assert_invariant()
    assert counters.reconnects == reconnects
    assert install_in(database.conn).steps == ()
    assert database.value("select to_regclass('listener.queue_lane_due_at_idx')") is not None


def test_an_uninstall_that_waits_for_a_reader_soon_lets_writers_on(database: Database) -> None:
    """What they need is locked already when it comes to the tables that a reader holds."""
    told: list[str] = []
    plan = install.plan_uninstall(read_facts(database.conn), drop_embeddings=False)
    with database.session() as reader, database.session("device") as writer:
        reader.execute("begin")
        reader.execute("select from listener.status")
        writer.execute("set lock_timeout = '1.5s'")
        with in_the_background(lambda: install.apply_plan(database.conn, plan, told.append)):
            try:
                while len(told) < 3:
                    insert(writer, "a")
            finally:
                reader.close()

    assert database.value("select to_regnamespace('listener')") is None


def test_an_uninstall_under_traffic_ends_the_service_and_no_writer(
    database: Database, static_model: Path, spawn: Spawn
) -> None:
    """The service ends with exit 3 and one clear line; devices write on."""
    settings = replace(database.settings, embedding_model=str(static_model))
    service = spawn(settings, "run")
    service.wait_for("event=listening")
    with traffic(database) as devices:
        wait_until(database.embedded)

        uninstall_in(database.conn, drop_embeddings=True)

        assert service.process.wait(30) == 3
        devices.wait_for_more()
    last = service.output().splitlines()[-1]
    # Which of two lines it is depends on whether the loss of a table ends its session first.
    assert last.startswith("listener: the ")
    assert last.endswith("run `listener install`")
    assert "Traceback" not in service.output()
