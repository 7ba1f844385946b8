"""A worker that is killed, stopped, hung or poisoned loses nothing and takes no mate with it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial

import pytest

from listener.pipeline import _FIRST_CLAIM
from tests.harness import Command, Database, Spawn, TinyEmbedder, listener, wait_until
from tests.misbehaviour import LOSE_CONNECTION, replace_input
from tests.tiny_worker import STEPS

_TINY = "tests.tiny_worker"


def start(spawn: Spawn, database: Database, **variables: str) -> Command:
    """A worker process with the tiny model."""
    return spawn(database.settings, "run", module=_TINY, **variables)


def start_with_claim(spawn: Spawn, database: Database) -> Command:
    """A worker that has just claimed the only event and encodes it for seconds."""
    worker = start(spawn, database)
    worker.wait_for("event=listening")
    database.insert("slow")
    # Not only claimed: one that is stopped before it has read the text has nothing to write.
    worker.wait_for("event=encoding_slowly")
    return worker


def keep_running(spawn: Spawn, database: Database, **variables: str) -> Callable[[], int]:
    """Start the worker again whenever it has ended, as systemd does. Tells how often it ended."""
    workers = [start(spawn, database, **variables)]

    def look() -> int:
        if workers[-1].process.poll() is not None:
            workers.append(start(spawn, database, **variables))
        return len(workers) - 1

    return look


def newest_lease(database: Database) -> int:
    """The last lease that an event was given."""
    return int(database.value("select coalesce(max(lease), 0) from listener.queue"))


def _is_claimed(database: Database, lease: int, attempts: int) -> bool:
    """Whether an event has a newer lease, and was claimed at least so often."""
    return bool(
        database.value(
            "select count(*) from listener.queue where lease > %s and attempts >= %s",
            lease,
            attempts,
        )
    )


@pytest.mark.parametrize("step", STEPS)
def test_a_worker_killed_at_any_step_loses_and_doubles_nothing(
    database: Database, spawn: Spawn, step: str
) -> None:
    """SIGKILL; the next worker finds all that was in hand."""
    if step == "during the backfill":
        database.rows("alter table public.iot_events disable trigger listener_inserted")
    database.insert(*map(str, range(50)))
    database.rows("alter table public.iot_events enable always trigger listener_inserted")
    dying = start(spawn, database, DIE_AT=step)
    assert dying.process.wait(30) == -signal.SIGKILL

    start(spawn, database)

    wait_until(lambda: len(database.embedded()) == 50)
    database.wait_for_rest()
    database.assert_invariant()


def test_a_peer_takes_over_from_a_killed_worker_long_before_the_lease_ends(
    database: Database, spawn: Spawn
) -> None:
    """With a lease of minutes and a poll of minutes."""
    database = database.with_settings(lease_seconds=300.0)
    victim = start_with_claim(spawn, database)
    # Else it would be done before its peer is there.
    victim.process.send_signal(signal.SIGSTOP)
    start(spawn, database, SLOW_SECONDS="0").wait_for("event=listening")

    victim.end(signal.SIGKILL)

    wait_until(database.embedded, 8.0)
    database.assert_invariant()


def test_a_stopped_worker_keeps_its_claim_until_the_lease_ends_and_is_fenced_after(
    database: Database, spawn: Spawn
) -> None:
    """SIGSTOP, and SIGCONT when a peer has the event: what the zombie writes counts for nothing."""
    database = database.with_settings(lease_seconds=4.0)
    zombie = start_with_claim(spawn, database)
    first_lease = newest_lease(database)
    zombie.process.send_signal(signal.SIGSTOP)
    start(spawn, database, SLOW_SECONDS="0").wait_for("event=listening")

    wait_until(lambda: newest_lease(database) > first_lease)
    database.rows("update public.iot_events set message = 'another'")
    database.wait_for_rest()
    written = database.rows("select xmin from public.event_embeddings")
    zombie.process.send_signal(signal.SIGCONT)
    zombie.wait_for("outdated=1")

    assert database.rows("select xmin from public.event_embeddings") == written
    database.assert_invariant()


def test_a_worker_ended_by_a_signal_in_mid_batch_encodes_nothing_that_is_encoded_again(
    database: Database, spawn: Spawn
) -> None:
    """SIGTERM: the batch in hand is finished and stored, the rest is left to the next worker."""
    events = 64
    database.insert(*(f"slow {number}" for number in range(events)))
    ended = start(spawn, database, BATCH_EVENTS="16", SLOW_SECONDS="2")
    ended.wait_for("event=encoding_slowly")

    assert ended.end(signal.SIGTERM) == 0
    stored = len(database.embedded())
    again = start(spawn, database, SLOW_SECONDS="0")
    wait_until(lambda: len(database.embedded()) == events)
    assert again.end(signal.SIGTERM) == 0

    assert [one.encoded_texts() for one in (ended, again)] == [stored, events - stored]
    assert 0 < stored < events
    database.assert_invariant()


@pytest.mark.parametrize(
    ("poison", "variables"),
    [
        ("segfault", {"MAX_ATTEMPTS": "3"}),
        ("hang", {"MAX_ATTEMPTS": "3", "ENCODE_SECONDS": "1"}),
        # Its mates have been with it on each of so few.
        ("gpu", {"MAX_ATTEMPTS": "1"}),
    ],
)
def test_a_text_that_kills_or_hangs_the_process_is_parked_and_its_mates_are_stored(
    database: Database, spawn: Spawn, poison: str, variables: dict[str, str]
) -> None:
    """Found by its attempts; visible in status, and replayable."""
    ids = database.insert(*(poison if number == 20 else str(number) for number in range(40)))
    deaths = keep_running(spawn, database, **variables)

    wait_until(lambda: deaths() >= 0 and database.is_at_rest(), 90)

    assert deaths() >= 3
    assert set(database.embedded()) == set(ids) - {ids[20]}
    (row,) = database.queue()
    assert (row.event_id, row.is_parked) == (ids[20], True)
    assert "its worker died or lost its lease" in row.error
    assert "parked" in listener(database.settings, "status").stdout
    database.rows("update public.iot_events set message = 'harmless' where id = %s", ids[20])
    wait_until(lambda: len(database.embedded()) == 40)
    database.assert_invariant()


def test_a_text_that_kills_each_process_while_it_is_read_is_parked(
    database: Database, spawn: Spawn
) -> None:
    """Before a claim that comes with its text is committed; each new process would begin anew."""
    replace_input(database, LOSE_CONNECTION)
    bad, good = database.insert("bad", "good")
    deaths = keep_running(spawn, database, DIE_AT_LOSS="1", MAX_ATTEMPTS="1")

    wait_until(lambda: deaths() >= 0 and database.is_at_rest(), 60)

    assert [(row.event_id, row.is_parked) for row in database.queue()] == [(bad, True)]
    assert set(database.embedded()) == {good}


def test_innocent_events_survive_more_deaths_than_they_have_attempts(
    database: Database, spawn: Spawn
) -> None:
    """A worker killed again and again for reasons of its own parks nothing."""
    database = database.with_settings(lease_seconds=300.0)
    ids = []
    for number in range(7):
        last = newest_lease(database)
        worker = start(spawn, database)
        # A full claim, so that while it is encoded those whose worker died are claimed as well.
        ids += database.insert(*(f"slow {number}, {mate}" for mate in range(_FIRST_CLAIM)))
        wait_until(partial(_is_claimed, database, last, attempts=min(number + 1, 2)))
        worker.end(signal.SIGKILL)

    start(spawn, database, SLOW_SECONDS="0")
    wait_until(lambda: database.embedded().keys() == set(ids), 60)

    assert database.queue() == []
    database.assert_invariant(TinyEmbedder.fingerprint)
