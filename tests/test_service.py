"""The loop survives what the database and the operator do to it."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from listener import queries
from listener.config import Settings
from listener.counters import counters
from listener.embedded import Server
from listener.encoding import Encoder
from listener.errors import ConnectionLost, LostOverEvents, SchemaError
from listener.pipeline import Pipeline
from listener.queue import Queue
from listener.service import Service, _Kept, _open_session
from listener.stop import Stop
from listener.sweep import Sweep
from listener.upkeep import discard_parked
from listener.wakeup import Wakeup
from tests.harness import (
    Database,
    Spawn,
    TinyEmbedder,
    environment,
    is_asleep,
    listener,
    serve_once,
    serving,
    wait_until,
)
from tests.misbehaviour import lose_every_other_write

_SERVICE_SESSIONS = """
select count(*) from pg_stat_activity
where datname = current_database() and application_name like 'listener-w%'
"""
_READ_WHOLE = """
select seq_tup_read from pg_stat_user_tables where relid = 'public.iot_events'::regclass
"""


def test_what_is_in_hand_when_a_connection_breaks_counts_as_never_claimed(
    database: Database,
) -> None:
    """Nobody died of it; taken for a death, five restarts of a server would park an event."""
    embedder = TinyEmbedder()
    embedder.may_run.clear()
    expiries = counters.lease_expiries

    with serving(database, embedder):
        database.insert("a")
        wait_until(lambda: any(row.is_claimed for row in database.queue()))
        database.terminate("listener-w%")
        embedder.may_run.set()
        wait_until(database.embedded)

    assert counters.lease_expiries == expiries


@pytest.mark.usefixtures("quick_reconnects")
def test_losses_of_connections_far_apart_make_no_suspect(database: Database) -> None:
    """An event that went through at last is not to blame for the losses before."""
    lose_every_other_write(database)
    expiries, reconnects = counters.lease_expiries, counters.reconnects
    with serving(database):
        database.insert("a")
        for _ in range(4):
            database.wait_for_rest()
            database.rows("update public.iot_events set message = message || 'a'")
        database.wait_for_rest()

    assert counters.reconnects - reconnects == 5
    assert counters.lease_expiries == expiries


def test_an_event_is_a_suspect_only_where_the_statement_was_about_it(database: Database) -> None:
    """Also one that was a suspect before; after an error that tells nothing all in hand are."""
    with closing(Encoder(TinyEmbedder, 0)) as encoder:
        service = Service(database.settings, encoder, Stop())
    left = []
    for error in [LostOverEvents("lost", [1])] * 3 + [LostOverEvents("lost", [2])]:
        service._kept.in_hand = {7: [1, 2]}
        service._suspect(error)
        left.append(service._kept.in_hand[7])
    assert left == [[1, 2], [1, 2], [2], [1, 2]]

    for _ in range(2):
        service._kept.in_hand = {7: [2, 3]}
        service._suspect(psycopg.DatabaseError("out of memory for query result"))

    assert service._kept.in_hand == {7: [3]}


def test_notifications_are_taken_while_the_service_is_busy(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver would keep all of them in memory, for as long as a backfill takes."""
    clear, cleared = Wakeup._clear, list[bool]()
    drain = Pipeline.drain

    def noted(wakeup: Wakeup) -> bool:
        cleared.append(clear(wakeup))
        return cleared[-1]

    monkeypatch.setattr(Wakeup, "_clear", noted)
    # There is always more to do.
    monkeypatch.setattr(Pipeline, "drain", lambda *arguments: max(drain(*arguments), 1))
    with serving(database.with_settings(notify="always")):
        wait_until(lambda: is_asleep(database))
        database.insert("a")

        wait_until(lambda: any(cleared))


def test_a_service_does_not_start_where_writers_queue_nothing(database: Database) -> None:
    """All would look well, and no event come."""
    database.rows("alter table public.iot_events disable trigger listener_inserted")

    with pytest.raises(SchemaError, match="triggers on iot_events are missing"):
        serve_once(database)


def test_the_wait_grows_where_each_session_fails_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk is full: to connect again five times a second makes it no better."""

    class Impatient(Stop):
        """Notes how long it is to wait, and stops at the sixth time."""

        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 6:
                self.set()

    def fail(*_: object) -> None:
        raise ConnectionLost("the disk is full")

    waits: list[float] = []
    # However slow the machine is.
    monkeypatch.setattr("listener.service._BRIEF_SECONDS", 3600.0)
    monkeypatch.setattr(Pipeline, "drain", fail)
    monkeypatch.setattr(random, "uniform", lambda least, _: least)

    Service(database.settings, Encoder(TinyEmbedder, 0), Impatient()).run()

    assert waits == [0.1, 0.2, 0.4, 0.4, 0.4, 0.4]


def test_the_wait_is_short_again_after_a_healthy_spell(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed before has nothing to do with it."""
    spells, waits = iter([0.0, 0.0, 0.0, 60.0, 0.0]), list[float]()
    now, stop = [1000.0], Stop()

    def serve(*_: object) -> None:
        now[0] += next(spells)
        raise ConnectionLost("gone")

    def note(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 5:
            stop.set()

    monkeypatch.setattr(Service, "_connect_and_serve", serve)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(random, "uniform", lambda least, _: least)
    monkeypatch.setattr(stop, "wait", note)

    Service(database.settings, Encoder(TinyEmbedder, 0), stop).run()

    assert waits == [0.1, 0.2, 0.4, 0.05, 0.1]


def test_a_wait_that_nothing_ends_lasts_as_long_as_it_was_told_to() -> None:
    """Else a server that is down would be asked hundreds of times a second."""
    began = time.monotonic()

    Stop().wait(0.1)

    assert time.monotonic() - began >= 0.1


def test_both_sessions_of_a_service_have_its_settings(server: Server, database: Database) -> None:
    """The one that listens works at every other beat; and a dead client is found by the server."""
    expected = {
        "statement_timeout": "8s",
        "lock_timeout": "6s",
        "idle_session_timeout": "0",
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "3",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "19000" if hasattr(socket, "TCP_USER_TIMEOUT") else "0",
    }
    name = database.conn.info.dbname
    database.rows(f"alter database {name} set idle_session_timeout = 3600000")
    assert server.port is not None
    settings = database.through(server.port).settings
    with (
        closing(Encoder(TinyEmbedder, 0)) as encoder,
        _open_session(settings, encoder, Stop(), _Kept(Sweep(settings))) as session,
    ):
        found = [
            {name: conn.execute(f"show {name}".encode()).fetchone() for name in expected}
            for conn in session._connections
        ]

    assert found == [{name: (value,) for name, value in expected.items()}] * 2


def test_what_the_schema_is_to_blame_for_counts_no_attempt(database: Database) -> None:
    """However often the service is started, or its events would be parked for it."""
    database.rows(
        "create function public.audit() returns trigger language plpgsql "
        "as $$begin perform from public.nothing; return null; end$$"
    )
    database.rows(
        "create trigger audit after insert on public.event_embeddings "
        "for each statement execute function public.audit()"
    )
    database.insert("a")

    with pytest.raises(SchemaError, match="nothing"):
        serve_once(database)

    assert [(row.attempts, row.is_claimed) for row in database.queue()] == [(0, False)]


def test_a_service_goes_on_where_an_upgrade_changes_what_a_statement_returns(
    database: Database,
) -> None:
    """What the session has prepared the server refuses from then on; a new one knows better."""
    with serving(database):
        for number in range(8):
            database.insert(f"before {number}")
            database.wait_for_rest()
        database.rows("alter table listener.queue alter attempts type integer")

        database.insert("after")
        database.wait_for_rest()


@pytest.mark.usefixtures("quick_reconnects")
@pytest.mark.parametrize("name", ["listener-wake", "listener-work", "listener-w%"])
def test_terminated_connections_are_replaced_and_nothing_in_the_gap_is_lost(
    database: Database, name: str
) -> None:
    """The one that listens, the one that works, both; with a poll of minutes."""
    with serving(database):
        for number in range(5):
            wait_until(lambda: is_asleep(database))
            database.terminate(name)
            database.insert(f"in the gap {number}")

            database.wait_for_rest()

    assert len(database.embedded()) == 5
    database.assert_invariant()


def test_the_connections_are_named_and_idle_outside_statements(database: Database) -> None:
    """No transaction stays open while the service sleeps or the model runs."""
    embedder = TinyEmbedder()
    with serving(database, embedder):
        wait_until(lambda: is_asleep(database))
        embedder.may_run.clear()
        database.insert("a")
        wait_until(lambda: any(row.is_claimed for row in database.queue()))

        wait_until(
            lambda: (
                database.rows(
                    "select application_name, state from pg_stat_activity "
                    "where datname = current_database() and application_name like 'listener-w%' "
                    "order by application_name"
                )
                == [("listener-wake", "idle"), ("listener-work", "idle")]
            )
        )
        embedder.may_run.set()
        database.wait_for_rest()


def test_a_stop_finishes_the_batch_in_hand_and_gives_the_next_one_back(database: Database) -> None:
    """Nothing that was encoded is thrown away; nothing unstarted stays leased."""
    embedder = TinyEmbedder()
    database = database.with_settings(batch_events=16)
    database.insert(*map(str, range(100)))
    embedder.may_run.clear()
    with serving(database, embedder) as service:
        wait_until(lambda: sum(row.is_claimed for row in database.queue()) == 32)

        service.stop_signal.set()
        wait_until(lambda: sum(row.is_claimed for row in database.queue()) == 16)
        embedder.may_run.set()
        service.stop()

    assert len(database.embedded()) == len(embedder.encoded) == 16
    assert [(row.attempts, row.is_claimed) for row in database.queue()] == [(0, False)] * 84


def test_a_long_encode_keeps_its_lease(database: Database) -> None:
    """A sign of life extends it, so that nobody else claims."""
    embedder = TinyEmbedder()
    database = database.with_settings(lease_seconds=1.0)
    database.insert("a")
    embedder.may_run.clear()
    due = "select due_at from listener.queue where lease is not null"
    with serving(database, embedder):
        first = wait_until(lambda: database.rows(due))
        wait_until(lambda: database.rows(due) > first)
        embedder.may_run.set()
        database.wait_for_rest()

    assert embedder.encoded == ["event_type: status\nseverity: info\nmessage: a"]


def test_two_workers_share_a_queue_without_encoding_twice(database: Database) -> None:
    """Postgres is the coordinator."""
    first, second = TinyEmbedder(), TinyEmbedder()
    with serving(database, first), serving(database, second):
        for start in range(0, 2000, 500):
            database.insert(*map(str, range(start, start + 500)))
        database.wait_for_rest()

    assert len(database.embedded()) == 2000
    assert len(first.encoded) + len(second.encoded) == 2000


@pytest.mark.parametrize(
    "damage",
    [
        "drop schema listener cascade",
        "alter table listener.queue drop constraint queue_pkey",
        "drop sequence listener.worker_token; create table listener.worker_token ()",
    ],
)
def test_a_database_without_the_install_ends_the_service_with_a_schema_error(
    database: Database, damage: str
) -> None:
    """Exit 3; waiting would not help."""
    database.rows(damage)

    with pytest.raises(SchemaError, match="listener install"), serving(database) as service:
        service.thread.join(20)


def test_a_worker_that_died_gives_its_events_up_at_once(database: Database) -> None:
    """Its lock goes with its session; a peer need not wait for the lease."""
    doomed, peer = TinyEmbedder(), TinyEmbedder()
    doomed.may_run.clear()
    database = database.with_settings(lease_seconds=3600.0)
    with serving(database, doomed):
        database.insert("a")
        wait_until(lambda: any(row.is_claimed for row in database.queue()))
        with serving(database, peer):
            database.rows(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where datname = current_database() and application_name = 'listener-work' "
                "and pid = (select a.pid from pg_stat_activity a where a.application_name = "
                "'listener-work' and a.datname = current_database() "
                "order by backend_start limit 1)"
            )
            database.wait_for_rest()

    database.assert_invariant()
    assert len(peer.encoded) == 1


def test_a_killed_service_started_again_encodes_twice_only_what_was_in_flight(
    database: Database, static_model: Path, spawn: Spawn
) -> None:
    """kill -9 in mid-drain: every event has a vector, and little work is done twice."""
    events = 20_000
    database.insert(*map(str, range(events)))
    settings = replace(
        database.settings,
        embedding_model=str(static_model),
        batch_events=64,
        lease_seconds=3600.0,
        cache_texts=0,
    )
    first = spawn(settings, "run")
    wait_until(lambda: len(database.embedded()) > 500, 60)

    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    # Its last write may still go on.
    wait_until(lambda: database.value(_SERVICE_SESSIONS) == 0)
    stored = len(database.embedded())
    assert stored < events
    again = spawn(settings, "run")
    database.wait_for_rest(60)
    assert again.end() == 0

    assert len(database.embedded()) == events
    assert database.queue() == []
    assert again.encoded_texts() == events - stored
    model = database.value("select distinct model from public.event_embeddings")
    database.assert_invariant(model)


def test_run_once_embeds_what_is_due_and_the_last_n_and_ends(static: Database) -> None:
    """For those who can't keep a process running."""
    swept, _ = static.insert("missed by a trigger", "due")
    static.rows("delete from listener.change where event_id = %s", swept)

    finished = listener(static.settings, "run", "--once")

    assert finished.stdout == ""
    assert len(static.embedded()) == 2
    assert static.value("select count(*) from listener.worker") == 0


def test_the_sweep_has_its_turn_where_events_never_cease(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no trigger saw would else not even be pending."""
    drain = Pipeline.drain
    monkeypatch.setattr(Pipeline, "drain", lambda *arguments: max(drain(*arguments), 1))
    # The first page has its turn in any case.
    monkeypatch.setattr("listener.sweep._PAGE", 1)
    ids = database.insert("a", "b", "c")
    database.forget_queue()

    with serving(database):
        wait_until(lambda: database.embedded().keys() == set(ids))


def test_the_sweep_is_repeated_on_its_timer(database: Database) -> None:
    """What a writer left without a trigger is found by a service that sleeps, each time."""
    (first,) = database.insert("a")
    with serving(database.with_settings(sweep_seconds=0.5, backfill_last_n=1)):
        for _ in range(2):
            wait_until(lambda: first in database.embedded())
            # The sweep before is over.
            wait_until(lambda: is_asleep(database))
            database.wait_for_rest()

            database.rows("delete from public.event_embeddings")

        wait_until(lambda: first in database.embedded())


def test_sweep_seconds_of_0_makes_the_first_sweep_the_last(database: Database) -> None:
    """Not one that is due again at once."""
    sweep = Sweep(database.with_settings(sweep_seconds=0).settings)
    with database.service_session() as conn:
        sweep.page(conn, Queue(conn, database.settings, None), TinyEmbedder.fingerprint)

    assert sweep.seconds_left() == math.inf


def test_a_parked_event_that_is_deleted_goes_with_the_next_sweep(database: Database) -> None:
    """An operator's natural remedy leaves nothing that would still count as parked."""
    database.park(*database.insert("bad"))
    with serving(database.with_settings(sweep_seconds=0.5)):
        wait_until(lambda: is_asleep(database))
        assert database.queue()
        database.rows("delete from public.iot_events")

        wait_until(lambda: database.queue() == [])


def test_a_parked_event_that_was_deleted_goes_when_a_service_starts(database: Database) -> None:
    """Where nothing is to be backfilled there is no sweep with which it would go."""
    database.park(*database.insert("bad"))
    database.rows("delete from public.iot_events")

    with serving(database.with_settings(backfill_last_n=0)):
        wait_until(lambda: database.queue() == [])


def test_parked_events_that_it_takes_too_long_to_look_at_stop_no_service(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Millions of them would be looked at first by each session, for ever."""
    monkeypatch.setattr("listener.upkeep._PARKED_SECONDS", 0.1)
    with database.service_session() as conn, database.session() as other, other.transaction():
        other.execute("lock table listener.queue in access exclusive mode")

        discard_parked(conn)

    assert caplog.messages == ["parked_events_not_looked_at"]


def test_parked_events_that_the_server_cannot_read_stop_no_service(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each session begins with a look at them, and would end with it."""
    unreadable = "do $$begin raise data_corrupted; end$$"
    monkeypatch.setattr(queries, "DISCARD_PARKED", unreadable)

    with serving(database):
        database.insert("a")
        wait_until(lambda: len(database.embedded()) == 1)

    assert "parked_events_not_looked_at" in caplog.messages
    assert "connection_lost" not in caplog.messages


def test_a_session_that_ends_while_parked_events_are_looked_at_ends_with_its_own_cause(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not later, as one that was closed already."""
    monkeypatch.setattr(
        queries, "DISCARD_PARKED", "select pg_catalog.pg_terminate_backend(pg_backend_pid())"
    )

    with database.session() as conn, pytest.raises(ConnectionLost, match="terminating connection"):
        discard_parked(conn)


def test_run_once_drops_parked_events_that_were_deleted(database: Database) -> None:
    """Where no process is kept running, it is all there is."""
    database.park(*database.insert("bad"))
    database.rows("delete from public.iot_events")

    serve_once(database)

    assert database.queue() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_cleanly(static: Database, spawn: Spawn, number: int) -> None:
    """Exit 0, no traceback, signed off."""
    service = spawn(static.settings, "run")
    service.wait_for("event=listening")

    assert service.end(number) == 0

    assert "Traceback" not in service.output()
    assert static.value("select count(*) from listener.worker") == 0


_SIGNALLED_TWICE = """
import os, signal
from listener.console import stop_on_signals
stop = stop_on_signals()
os.kill(os.getpid(), signal.{name})
assert stop.is_set()
os.kill(os.getpid(), signal.{name})
print("goes on")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    """Whoever presses Ctrl-C again does not want to wait for the batch."""
    ended = subprocess.run(
        [sys.executable, "-c", _SIGNALLED_TWICE.format(name=number.name)],
        env=environment(Settings()),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (-number, "")


def test_an_event_that_a_writer_holds_is_embedded_soon_after_it_lets_go(database: Database) -> None:
    """Locked while it was encoded, and not changed in the end: no waiting for the lease or poll."""
    embedder = TinyEmbedder()
    with serving(database, embedder), database.session() as writer:
        embedder.may_run.clear()
        database.insert("held")
        wait_until(lambda: database.leased() == 1)
        with writer.transaction():
            writer.execute("select from public.iot_events for update")
            embedder.may_run.set()
            wait_until(lambda: database.leased() == 0)

        wait_until(database.embedded, 5.0)

    assert len(embedder.encoded) == 1


@pytest.mark.parametrize("by", ["a stop", "a broken model"])
def test_events_that_are_given_back_wake_a_sleeping_peer(
    database: Database, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Of two workers one goes; what it gives back is not slept through by the other."""
    # A beat would find what was given back, without being woken.
    monkeypatch.setattr("listener.service.BEAT_SECONDS", 120.0)
    going, staying = TinyEmbedder(), TinyEmbedder()
    database = database.with_settings(batch_events=1)
    with serving(database, staying):
        wait_until(lambda: is_asleep(database))
        with serving(database, going) as worker:
            wait_until(lambda: database.value("select count(*) from listener.worker") == 2)
            going.may_run.clear()
            staying.may_run.clear()
            database.insert("a", "b", "c", "d", "e")
            wait_until(lambda: database.leased() == 4)
            staying.may_run.set()
            wait_until(lambda: len(database.embedded()) == 3 and is_asleep(database))
            if by == "a stop":
                worker.stop_signal.set()
            else:
                going.is_broken = True
                going.may_run.set()

            wait_until(lambda: len(database.embedded()) >= 4, 10.0)
        wait_until(lambda: len(database.embedded()) == 5)


def test_no_plan_from_when_the_table_was_empty_reads_it_whole_later(database: Database) -> None:
    """The check of the foreign key too has its plan for as long as the session lives."""
    database.rows("vacuum analyze public.iot_events")

    with serving(database):
        # One by one, so often that every statement has its generic plan.
        for message in map(str, range(12)):
            database.insert(message)
            database.wait_for_rest()
        database.insert(*["a", "b"] * 1_000)
        database.wait_for_rest()

    # A session tells what it read when it ends.
    wait_until(lambda: not database.value(_SERVICE_SESSIONS))
    assert database.value(_READ_WHOLE) < 100_000
    assert len(database.embedded()) == 2_012
