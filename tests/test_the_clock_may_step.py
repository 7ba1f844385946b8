"""The database's clock is set an hour forward or back, for real, under a running service."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.harness import Database, Spawn, TinyEmbedder, is_asleep, serving, wait_until
from tests.own_server import MakeServer, installed
from tests.test_processes_may_die import start_with_claim

_LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
pytestmark = pytest.mark.skipif(_LIBRARY is None, reason="no libfaketime on this machine")


@dataclass
class Clock:
    """The clock of one server and its sessions."""

    file: Path

    def step(self, hours: int) -> None:
        """Set it so many hours from the true time."""
        self.file.write_text(f"{hours * 3600:+d}")


@pytest.fixture
def clock(open_folder: Path) -> Clock:
    """A clock that is right as yet."""
    clock = Clock(open_folder / "clock")
    clock.step(0)
    return clock


@pytest.fixture
def database(
    clock: Clock, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    """An installed database whose server goes by the clock."""
    with monkeypatch.context() as environment:
        environment.setenv("LD_PRELOAD", str(_LIBRARY))
        environment.setenv("FAKETIME_TIMESTAMP_FILE", str(clock.file))
        environment.setenv("FAKETIME_NO_CACHE", "1")
        environment.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        server = make_server()
    with installed(server) as database:
        yield database


def server_time(database: Database) -> datetime:
    """By the clock of the server."""
    now: datetime = database.value("select clock_timestamp()")
    return now


def test_a_clock_set_forward_ends_leases_and_nothing_is_stored_twice(
    database: Database, clock: Clock
) -> None:
    """A peer takes the events over, and the worker that had them is fenced."""
    slow, quick = TinyEmbedder(), TinyEmbedder()
    slow.may_run.clear()
    before = server_time(database)
    with serving(database, slow) as first:
        database.insert("a", "b", "c")
        wait_until(lambda: database.leased() == 3)
        with serving(database, quick):
            clock.step(1)
            wait_until(lambda: len(database.embedded()) == 3)
            assert timedelta(hours=1) <= server_time(database) - before < timedelta(hours=2)
        written = database.rows("select xmin::text, event_id from public.event_embeddings")
        slow.may_run.set()
        database.insert("after")
        wait_until(lambda: len(database.embedded()) == 4)
        first.stop()

    assert written == database.rows(
        "select xmin::text, event_id from public.event_embeddings where event_id <= 3"
    )
    assert database.queue() == []
    database.assert_invariant()


def test_a_clock_set_back_delays_neither_new_events_nor_those_given_back(
    database: Database, clock: Clock
) -> None:
    """Their place in line is an hour ahead of the clock then."""
    embedder = TinyEmbedder()
    database = database.with_settings(batch_events=2)
    with serving(database, embedder) as service:
        database.insert("before")
        wait_until(lambda: is_asleep(database) and database.embedded())
        embedder.may_run.clear()
        database.insert(*map(str, range(8)))
        wait_until(lambda: database.leased() == 4)
        clock.step(-1)
        service.stop_signal.set()
        wait_until(lambda: database.leased() == 2)
        embedder.may_run.set()
        service.stop()
    assert len(database.embedded()) == 3

    with serving(database):
        database.insert("after")
        database.rows("update public.iot_events set message = 'changed' where id = 1")
        wait_until(lambda: len(database.embedded()) == 10)
        database.wait_for_rest()

    database.assert_invariant()


def test_events_of_a_worker_that_died_are_taken_over_although_the_clock_was_set_back(
    database: Database, clock: Clock, spawn: Spawn
) -> None:
    """Their lease lasts for an hour more; that the worker's session is gone ends it."""
    victim = start_with_claim(spawn, database)
    clock.step(-1)
    victim.end(signal.SIGKILL)

    with serving(database):
        wait_until(database.embedded)
        database.wait_for_rest()

    database.assert_invariant()
