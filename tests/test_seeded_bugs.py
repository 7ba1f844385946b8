"""The test of the tests: a scenario that holds on the real code fails once a bug is sown in.

Where two fences guard the same thing, a seed takes both away; either alone is not to be missed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import Phase

from listener import queries
from listener.claim import Claim, Event, SweepPage
from listener.queue import Queue
from listener.service import _Session
from listener.wakeup import Wakeup
from tests.harness import Database, claimed, serving, store, wait_until
from tests.state_machine import MODEL, plant
from tests.test_state_machine import walk

Scenario = Callable[[Database], None]
Seed = Callable[[Database, pytest.MonkeyPatch], None]

# A wake-up takes milliseconds; the poll of these tests takes minutes.
_WOKEN_SECONDS = 3.0
_SWEEPER_LOCK = 470_213

# --- scenarios ---------------------------------------------------------------------------------


def ids_commit_out_of_order(database: Database) -> None:
    """The id that was taken first is committed last, both where no trigger sees it."""
    database.rows("alter table public.iot_events disable trigger user")
    with database.service_session() as conn:
        queue = Queue(conn, database.settings, None)
        with database.session() as writer, writer.transaction():
            writer.execute(
                "insert into public.iot_events (device_id, event_type, severity) "
                "values ('d', 't', 's')"
            )
            database.insert("second")
            sweep_and_drain(queue)
            assert len(database.embedded()) == 1

        sweep_and_drain(queue)

        assert len(database.embedded()) == 2, "never embedded"


def an_event_is_stored_while_it_is_swept(database: Database) -> None:
    """After the sweep looked at the vectors and before it writes to the queue."""
    with database.service_session() as conn, database.service_session("sweeper") as sweeper:
        queue = Queue(conn, database.settings, None)
        hold_sweepers(database)
        # Of one that has an embedding and does not wait a sweep asks the text.
        database.insert("embedded")
        store(queue, *take(queue))
        database.insert("a")
        claim, events = take(queue)
        pages: list[SweepPage] = []
        sweep = partial(Queue(sweeper, database.settings, None).sweep, MODEL, None, 10)
        thread = threading.Thread(target=lambda: pages.append(sweep()))
        thread.start()
        try:
            wait_until(partial(has_waiting_sweeper, database))

            store(queue, claim, events)
        finally:
            database.rows("select pg_advisory_unlock(%s)", _SWEEPER_LOCK)
            thread.join()

    assert [page.queued for page in pages] == [0], "queued again"
    assert database.queue() == []


def a_commit_between_the_last_drain_and_the_sleep(database: Database) -> None:
    """It finds the gate closed and notifies; somebody must have been listening by then."""
    commits_once_before(database, "sleep")


def a_commit_between_the_drain_and_the_gate(database: Database) -> None:
    """It finds the gate open and does not notify; somebody must look again."""
    commits_once_before(database, "prepare_sleep")


def every_interleaving(database: Database) -> None:
    """Those of the state machine, as far as it takes to meet the bug."""
    with plant(database) as made:
        walk(made, walks=1000, phases=[Phase.generate])


# --- what they are made of ---------------------------------------------------------------------


def take(queue: Queue) -> tuple[Claim, list[Event]]:
    claim = claimed(queue, 10)
    return claim, queue.read(claim)


def sweep_and_drain(queue: Queue) -> None:
    if queue.sweep(MODEL, None, 10).queued:
        store(queue, *take(queue))


def hold_sweepers(database: Database) -> None:
    """Make the sweep read the texts under its snapshot, and go on when told to."""
    database.rows("select pg_advisory_lock(%s)", _SWEEPER_LOCK)
    database.rows(
        f"""
        create or replace function listener.embedding_input(event public.iot_events)
        returns text language plpgsql stable set search_path = '' as $$
        begin
          if current_setting('application_name') = 'sweeper' then
            perform pg_advisory_xact_lock_shared({_SWEEPER_LOCK});
          end if;
          return event.message;
        end $$
        """
    )


def has_waiting_sweeper(database: Database) -> bool:
    return bool(
        database.rows("select 1 from pg_locks where objid = %s and not granted", _SWEEPER_LOCK)
    )


def commits_once_before(database: Database, method: str) -> None:
    """A service at rest, but for one commit right before its first call of this method."""
    database = database.with_settings(backfill_last_n=0)
    real = getattr(Wakeup, method)
    committed: list[int] = []

    def commit_and_call(wakeup: Wakeup, *arguments: float) -> object:
        # A row that is there before the worker leads is found by every first drain.
        if not committed:
            committed.extend(database.insert("between"))
        return real(wakeup, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wakeup, method, commit_and_call)
        with serving(database):
            # The limit is one for waking up, not for connecting.
            wait_until(lambda: committed)
            wait_until(database.embedded, _WOKEN_SECONDS)


# --- seeds -------------------------------------------------------------------------------------


def without(text: str, *parts: str) -> str:
    """The text without these parts, which must be there, lest a seed sows nothing."""
    for part in parts:
        assert part in text, part
        text = text.replace(part, "")
    return text


def sow_in_function(database: Database, signature: str, *parts: str) -> None:
    body = database.value("select pg_get_functiondef(%s::regprocedure)", signature)
    database.rows(without(body, *parts))


_VERSION = "\n    and q.version = d.version"
_TEXT = """  where h.content_hash = sha256(pg_catalog.convert_to(
    coalesce(e.input, ''), 'UTF8'
  ))
"""
_LEASE = "\n    and q.lease = %(lease)s"


def watermark(_: Database, patch: pytest.MonkeyPatch) -> None:
    """Sweep what has a greater id than the greatest embedded one."""
    patch.setattr(
        queries,
        "SWEEP",
        """
        with queued as (
          insert into listener.queue (event_id)
          select e.id from listener.event e
          where e.id > (select coalesce(max(m.event_id), 0) from listener.embedding m)
          returning 1
        )
        select count(*), count(*), null from queued
        """,
    )


def no_version_fence(_: Database, patch: pytest.MonkeyPatch) -> None:
    """A change fences nobody out, and the write compares neither version nor text."""
    for name in ("TAKE", "TAKE_AND_READ"):
        before, fence = getattr(queries, name).split("do update set")
        after = fence.split("returning", 1)[1]
        patch.setattr(queries, name, f"{before}do nothing returning{after}")
    patch.setattr(queries, "WRITE", without(queries.WRITE, _VERSION, _TEXT))


def no_lease_fence(_: Database, patch: pytest.MonkeyPatch) -> None:
    """A worker writes whatever became of its claim."""
    patch.setattr(queries, "WRITE", without(queries.WRITE, _LEASE))


def no_lock_of_the_living(_: Database, patch: pytest.MonkeyPatch) -> None:
    """Every other worker passes for dead."""
    probe = "pg_catalog.pg_try_advisory_xact_lock(%(lock_class)s, w.worker::integer)"
    assert probe in queries.BEAT
    patch.setattr(queries, "BEAT", queries.BEAT.replace(probe, "%(lock_class)s > 0"))


def no_look_at_the_queue_in_the_sweep(database: Database, _: pytest.MonkeyPatch) -> None:
    """On conflict do nothing is left to keep the queue to one row per event."""
    sow_in_function(
        database,
        "listener.sweep(text, text, integer, timestamptz)",
        "q.event_id is null\n      and",
    )


def listens_when_it_sleeps(_: Database, patch: pytest.MonkeyPatch) -> None:
    """Drain first, LISTEN after."""
    sleep = Wakeup.sleep

    def listen_and_sleep(wakeup: Wakeup, seconds: float) -> bool:
        wakeup._conn.execute("listen listener")
        return sleep(wakeup, seconds)

    patch.setattr(queries, "LISTEN", "select")
    patch.setattr(Wakeup, "sleep", listen_and_sleep)


def no_drain_behind_the_gate(_: Database, patch: pytest.MonkeyPatch) -> None:
    """Close the gate and go to sleep."""
    drain = _Session._drain

    def drain_unless_closed(session: _Session) -> int:
        return 0 if session._wakeup._gate_closed else drain(session)

    patch.setattr(_Session, "_drain", drain_unless_closed)


PAIRS: list[tuple[Scenario, Seed, str]] = [
    (ids_commit_out_of_order, watermark, "never embedded"),
    (an_event_is_stored_while_it_is_swept, no_look_at_the_queue_in_the_sweep, "queued again"),
    (a_commit_between_the_last_drain_and_the_sleep, listens_when_it_sleeps, "not within 3"),
    (a_commit_between_the_drain_and_the_gate, no_drain_behind_the_gate, "not within 3"),
    (every_interleaving, no_version_fence, "is lost|older text|never had"),
    (every_interleaving, no_lease_fence, "stored without the lease"),
    (every_interleaving, no_lock_of_the_living, "held by the dead|although leased"),
]


def name_of(value: object) -> str:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(
    "scenario",
    # The state machine has its own test.
    [scenario for scenario, _, _ in PAIRS if scenario is not every_interleaving],
)
def test_the_scenario_holds_on_the_real_code(database: Database, scenario: Scenario) -> None:
    """Without this half, a scenario that always fails would pass for a sharp one."""
    scenario(database)


@pytest.mark.parametrize(("scenario", "seed", "complaint"), PAIRS, ids=name_of)
def test_the_seeded_bug_is_found(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Scenario,
    seed: Seed,
    complaint: str,
) -> None:
    """Each seed is a mistake that this kind of program is known for."""
    seed(database, monkeypatch)

    with pytest.raises(AssertionError, match=complaint):
        scenario(database)
