"""What a worker does for others at each beat, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from listener.claim import Claim
from listener.config import Settings
from listener.database import Connection, connect
from listener.queue import Queue
from listener.worker import LOCK_CLASS, Worker, beat
from tests.harness import (
    Database,
    NewDatabase,
    TinyEmbedder,
    as_service,
    claimed,
    is_asleep,
    serve_once,
    serving,
    wait_until,
)

NOBODY = 0
MODEL = TinyEmbedder.fingerprint


@pytest.fixture
def peer(database: Database) -> Iterator[Connection]:
    """The session of a worker that lives."""
    with database.service_session() as conn:
        yield conn


def die_after(database: Database, act: Callable[[Queue, Claim], object] = lambda *_: None) -> None:
    """A worker claims what is due, does that with it, and its session ends without a word."""
    conn = connect(database.settings, "listener-work")
    worker = Worker.registered(conn, MODEL).__enter__()
    queue = Queue(conn, database.settings, worker.number)
    act(queue, claimed(queue))
    pid = conn.info.backend_pid
    database.rows("select pg_terminate_backend(%s)", pid)
    wait_until(lambda: not database.rows("select 1 from pg_locks where pid = %s", pid))
    conn.close()


def test_after_a_second_death_an_event_goes_to_the_end_of_the_line(
    database: Database, peer: Connection
) -> None:
    """At the front an innocent one would be in hand at every death that follows."""
    database.insert("a")
    database.rows("update listener.change set changed_at = now() - interval '1 h'")
    is_at_its_place = "select due_at < now() - interval '30 min' from listener.queue"

    die_after(database)
    assert beat(peer, NOBODY)
    assert database.value(is_at_its_place)

    die_after(database)
    assert beat(peer, NOBODY)
    assert not database.value(is_at_its_place)


def test_a_dead_worker_is_known_until_all_its_events_are_released(
    database: Database, peer: Connection
) -> None:
    """One that somebody holds for a moment would else wait until its lease ends."""
    database.insert("a")
    die_after(database)
    with database.session() as other, other.transaction():
        other.execute("select from listener.queue for update")
        beat(peer, NOBODY)

    assert beat(peer, NOBODY)
    assert database.leased() == 0


def test_a_worker_that_ends_by_an_error_is_known_until_its_events_are_released(
    database: Database, peer: Connection
) -> None:
    """Nobody would know whose they were, and they would wait until the lease ends."""
    database.insert("a")
    conn = connect(database.settings, "listener-work")
    pid = conn.info.backend_pid

    def claim_and_fail() -> None:
        with Worker.registered(conn, MODEL) as worker:
            claimed(Queue(conn, database.settings, worker.number))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        claim_and_fail()
    conn.close()
    wait_until(lambda: not database.rows("select 1 from pg_locks where pid = %s", pid))

    assert beat(peer, NOBODY)

    assert database.leased() == 0


def test_run_once_embeds_what_a_dead_worker_had_in_hand(database: Database) -> None:
    """It ends before its next beat, and until the lease is over nothing is due."""
    (event_id,) = database.insert("a")
    die_after(database)

    serve_once(database)

    assert database.embedded().keys() == {event_id}


def test_an_event_that_failed_waits_its_time_though_its_worker_dies(
    database: Database, peer: Connection
) -> None:
    """It is in nobody's hand any more."""
    database = database.with_settings(retry_seconds=3600.0)
    database.insert("a")

    die_after(database, lambda queue, claim: queue.fail(claim.lease, claim.event_ids, "why"))

    assert not beat(peer, NOBODY)


def test_a_backfilled_event_that_is_due_again_is_found_by_a_beat(database: Database) -> None:
    """Of a failed one no NOTIFY tells, and the poll of this service comes in two minutes."""
    with serving(database.with_settings(backfill_last_n=0)):
        (event_id,) = database.insert("a")
        wait_until(lambda: database.embedded() and is_asleep(database))
        database.rows(
            "insert into listener.queue (event_id, lane, due_at) "
            "values (%s, 1, now() + interval '1 s')",
            event_id,
        )

        wait_until(lambda: not database.queue())


def test_a_worker_that_lives_is_seen_anew(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `seen_at` an operator tells it from one that hangs."""
    monkeypatch.setattr("listener.worker._SEEN_SECONDS", 0.0)
    seen = "select seen_at from listener.worker"
    with serving(database):
        first = wait_until(lambda: database.rows(seen))

        wait_until(lambda: database.rows(seen) > first)


def test_locks_of_numbers_to_come_that_somebody_holds_stop_no_worker(database: Database) -> None:
    """Any role that may connect can take them."""
    with database.session() as hostile:
        hostile.execute(
            "select pg_advisory_lock(%s, n) from generate_series(1, 20) n", [LOCK_CLASS]
        )
        with serving(database):
            database.insert("a")
            wait_until(database.embedded)

            assert database.rows("select worker from listener.live_worker") == [(21,)]


def test_a_worker_of_another_database_is_not_listed(
    database: Database, template: str, new_database: NewDatabase
) -> None:
    """Its lock has the same number, and is another lock."""
    with new_database(template) as url:
        settings = Settings(database_url=as_service(url))
        with connect(settings, "listener-work") as conn, Worker.registered(conn, MODEL) as worker:
            database.rows(
                "insert into listener.worker (worker, host, pid, model) values (%s, 'h', 1, 'm')",
                worker.number,
            )

            assert database.value("select count(*) from listener.live_worker") == 0
