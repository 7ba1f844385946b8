"""The sleep gate: writers notify only while a worker sleeps, and no commit is slept through."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from listener import queries
from listener.database import Connection
from listener.stop import Stop
from listener.wakeup import Wakeup
from tests.harness import DEADLINE_SECONDS, Database, is_asleep, serving, wait_until


@contextmanager
def listening(database: Database, mode: str = "gated") -> Iterator[Wakeup]:
    """A worker's wake-up, and the connection it works on."""
    with database.service_session("listener-wake") as wake, database.service_session() as work:
        wakeup = Wakeup(wake, Stop(), mode, poll_seconds=60.0)
        wakeup.listen(work)
        yield wakeup
        wakeup.close()


@contextmanager
def ear(database: Database) -> Iterator[Connection]:
    """A session that hears every NOTIFY of the writers."""
    with database.session() as conn:
        conn.execute("listen listener")
        yield conn


def heard(conn: Connection) -> int:
    """How many notifications have come."""
    conn.execute("select 1")
    return len(list(conn.notifies(timeout=0.1)))


def test_a_wait_lasts_as_long_as_it_should_or_until_the_stop() -> None:
    """The waits between attempts to connect are such."""
    stop, began = Stop(), time.monotonic()

    stop.wait(0.2)
    waited = time.monotonic() - began
    stop.set()
    stop.wait(DEADLINE_SECONDS)

    assert waited >= 0.2
    assert time.monotonic() - began < DEADLINE_SECONDS


def test_a_writer_that_leaves_nothing_to_do_wakes_nobody(database: Database) -> None:
    """As a statement that finds no row, or changes what is not embedded."""
    database.insert("a")
    with ear(database) as conn, listening(database) as wakeup:
        wakeup.prepare_sleep()

        database.rows("update public.iot_events set created_at = now()")
        database.insert()
        assert heard(conn) == 0

        database.rows("update public.iot_events set message = 'b'")
        assert heard(conn) == 1


def test_writers_notify_only_while_a_worker_sleeps(database: Database) -> None:
    """The gate is open, closed, and open again."""
    with ear(database) as conn, listening(database) as wakeup:
        database.insert("gate open")
        assert heard(conn) == 0

        wakeup.prepare_sleep()
        # As after a poll that found nothing.
        wakeup.prepare_sleep()
        database.insert("gate closed")
        assert heard(conn) == 1

        wakeup.open_gate()
        database.insert("gate open again")
        assert heard(conn) == 0


def test_a_statement_of_no_rows_wakes_nobody(database: Database) -> None:
    """As an update whose condition holds for none, again and again."""
    with ear(database) as conn, listening(database) as wakeup:
        wakeup.prepare_sleep()

        database.rows("insert into public.iot_events (device_id) select '' where false")
        database.rows("update public.iot_events set message = ''")

        assert heard(conn) == 0


def test_a_leader_with_much_to_do_wakes_its_followers(database: Database) -> None:
    """They would else look at the queue a second later."""
    with (
        listening(database) as follower,
        listening(database) as leader,
        database.service_session() as work,
    ):
        leader.prepare_sleep()
        follower.prepare_sleep()

        leader.call_help(work)

        assert follower.sleep(5.0)


def test_a_copy_of_many_rows_notifies_once(database: Database) -> None:
    """One statement, one wake-up."""
    with ear(database) as conn, listening(database) as wakeup:
        wakeup.prepare_sleep()

        database.insert(*map(str, range(1000)))

        assert heard(conn) == 1


def test_notifications_taken_while_there_was_no_sleep_end_the_next(database: Database) -> None:
    """Once: what they told of may have come after the last look."""
    with listening(database) as wakeup:
        wakeup.prepare_sleep()
        database.insert("a", "b")

        def has_taken_them() -> bool:
            wakeup.take_notes()
            return wakeup._was_notified

        wait_until(has_taken_them)

        assert wakeup.sleep(60.0)
        assert not wakeup.sleep(0.1)


def test_a_writer_in_flight_keeps_the_worker_from_sleeping(database: Database) -> None:
    """It did not notify, so the worker looks again soon instead of sleeping through its commit."""
    with listening(database) as wakeup, database.session() as writer:
        with writer.transaction():
            writer.execute(
                "insert into public.iot_events (device_id, event_type, severity) "
                "values ('d', 't', 's')"
            )
            looks = [wakeup.prepare_sleep() for _ in range(6)]

        assert all(seconds <= 0.05 for seconds in looks)
        assert looks == sorted(looks)
        assert looks[0] < looks[-1], "a long transaction costs fewer looks"
        assert wakeup.prepare_sleep() > 1


def test_a_commit_after_the_gate_closed_ends_the_sleep(database: Database) -> None:
    """That writer finds the gate closed and notifies."""
    with listening(database) as wakeup:
        seconds = wakeup.prepare_sleep()

        database.insert("a")

        assert wakeup.sleep(seconds)


@pytest.mark.parametrize("after_seconds", [0.0, 0.2], ids=["before", "during"])
def test_a_stop_ends_a_sleep(database: Database, after_seconds: float) -> None:
    """From a signal handler or another thread, before or during it."""
    with database.service_session("listener-wake") as wake:
        stop = Stop()
        wakeup = Wakeup(wake, stop, "gated", poll_seconds=60.0)
        timer = threading.Timer(after_seconds, stop.set)
        timer.start()
        if not after_seconds:
            timer.join()
        began = time.monotonic()

        assert not wakeup.sleep(3 * DEADLINE_SECONDS)
        assert stop.is_set()
        assert time.monotonic() - began < DEADLINE_SECONDS
        wakeup.close()
        timer.join()


def test_a_worker_that_hears_another_one_prove_its_session_proves_its_own(
    database: Database,
) -> None:
    """As where several are started together."""
    with database.service_session("listener-wake") as wake, database.service_session() as work:
        proved = wake.execute

        def with_another(statement: str, *arguments: Any) -> Any:
            found = proved(statement, *arguments)
            if statement == queries.LISTEN_PROBE:
                database.rows("select pg_notify('listener_probe', 'of another worker')")
                proved("select 1")
            return found

        wake.execute = with_another  # type: ignore[method-assign,assignment]
        wakeup = Wakeup(wake, Stop(), "gated", poll_seconds=60.0)

        assert wakeup.listen(work)
        wakeup.close()


def test_only_the_leader_is_woken_and_a_follower_takes_over(database: Database) -> None:
    """One insert, one worker: no herd; a dead leader is succeeded."""
    with listening(database) as follower:
        with listening(database) as leader:
            assert leader.prepare_sleep() > 10
            assert follower.prepare_sleep() < 2

            database.insert("a")

            assert leader.sleep(5.0)
            assert not follower.sleep(0.2)

        wait_until(lambda: follower.prepare_sleep() > 10)
        database.insert("b")
        assert follower.sleep(5.0)


def test_always_notifies_at_every_commit_and_never_at_none(database: Database) -> None:
    """The two ways around the gate."""
    with ear(database) as conn:
        with listening(database, "always") as wakeup:
            wakeup.prepare_sleep()
            wakeup.open_gate()
            database.insert("a")
            assert heard(conn) == 1

        # The server may take its time to end a session.
        wait_until(lambda: not is_asleep(database))
        with listening(database, "never") as wakeup:
            wakeup.prepare_sleep()
            database.insert("b")
            assert heard(conn) == 0


def test_without_notify_events_are_found_by_polling(database: Database) -> None:
    """What a transaction pooler leaves."""
    database = database.with_settings(notify="never", poll_seconds=0.2)
    with serving(database):
        for _ in range(3):
            database.insert("a")
            database.wait_for_rest()
            assert not is_asleep(database)

        assert len(database.embedded()) == 3


def test_no_poll_is_later_than_it_was_told_to_be(database: Database) -> None:
    """Nor do the workers all look at the same time."""
    with listening(database, "never") as wakeup:
        looks = {wakeup.prepare_sleep() for _ in range(50)}

        assert max(looks) <= wakeup._poll_seconds
    assert len(looks) > 1


def test_without_notify_a_worker_has_a_session_and_is_listed(database: Database) -> None:
    """Only the writers are silent; what a session of its own gives, it has."""
    database = database.with_settings(notify="never", poll_seconds=0.2)
    with serving(database):
        database.insert("a")
        wait_until(database.embedded)

        assert database.value("select count(*) from listener.live_worker") == 1


def test_eight_idle_workers_and_one_insert_are_no_herd(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is woken and encodes; the others sleep on."""
    sleep, woken, rested = Wakeup.sleep, list[Wakeup](), set[Wakeup]()

    def counted(wakeup: Wakeup, seconds: float) -> bool:
        is_woken = sleep(wakeup, seconds)
        if is_woken:
            woken.append(wakeup)
        else:
            rested.add(wakeup)
        return is_woken

    monkeypatch.setattr(Wakeup, "sleep", counted)
    with ExitStack() as stack:
        services = [stack.enter_context(serving(database)) for _ in range(8)]
        wait_until(lambda: is_asleep(database) and len(rested) == 8)
        woken.clear()
        database.insert("one")
        wait_until(lambda: woken and database.embedded() and is_asleep(database))

        assert sum(len(service.embedder.encoded) for service in services) == 1
        assert len(woken) == 1
