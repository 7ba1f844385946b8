"""Every way in which a claim can end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psycopg
import pytest

from listener import queries
from listener.claim import Event, SweepPage
from listener.counters import counters
from listener.database import Connection
from listener.queue import Queue
from listener.upkeep import delete_orphans, retry
from listener.worker import LOCK_CLASS
from tests.harness import (
    Database,
    Queued,
    TinyEmbedder,
    claimed,
    is_asleep,
    serve_once,
    serving,
    store,
    unread,
    vector_of,
    wait_until,
)
from tests.statements import PARAMETERS, STATEMENTS

MODEL = TinyEmbedder.fingerprint


@pytest.fixture
def queue(database: Database) -> Iterator[Queue]:
    """The queue as a worker without registration sees it."""
    with database.service_session() as conn:
        yield Queue(conn, database.settings, None)


def test_an_event_is_claimed_by_one_worker_only(database: Database, queue: Queue) -> None:
    """A lease keeps others away."""
    ids = database.insert("a", "b")

    first, second = claimed(queue), queue.claim(100)

    assert sorted(map(str, first.event_ids)) == sorted(map(str, ids))
    assert second is None


def test_an_expired_lease_lets_another_worker_claim(database: Database, queue: Queue) -> None:
    """A worker that vanished delays its events by one lease."""
    database.insert("a")
    first = claimed(queue)
    database.rows("update listener.queue set due_at = now()")

    second = claimed(queue)

    assert second.event_ids == first.event_ids
    assert second.lease > first.lease


def test_a_zombie_can_not_write_after_its_lease_was_taken_over(
    database: Database, queue: Queue
) -> None:
    """The fence is the lease token."""
    database.insert("a")
    zombie = claimed(queue)
    late = queue.read(zombie)
    database.rows("update listener.queue set due_at = now()")
    claimed(queue)

    stored = queue.write(zombie.lease, late, [vector_of(late[0].text)], MODEL)

    assert not stored
    assert database.embedded() == {}


def test_an_event_updated_while_encoded_is_embedded_again(database: Database, queue: Queue) -> None:
    """A vector of an older text is no failure, but not stored; the new text is claimed at once."""
    failed = counters.failed_attempts
    database.insert("old")
    claim = claimed(queue)
    events = queue.read(claim)
    database.rows("update public.iot_events set message = 'new'")

    stored = queue.write(claim.lease, events, [vector_of(events[0].text)], MODEL)

    assert not stored
    assert counters.failed_attempts == failed
    assert "new" in queue.read(claimed(queue))[0].text


def test_a_vector_of_an_older_version_is_refused_even_under_its_own_lease(
    database: Database, queue: Queue
) -> None:
    """The second fence, should a change ever leave the lease in place."""
    database.insert("old")
    claim = claimed(queue)
    events = queue.read(claim)
    database.rows("update listener.queue set version = version + 1")

    assert not queue.write(claim.lease, events, [vector_of(events[0].text)], MODEL)

    assert [row.is_claimed for row in database.queue()] == [False]


def test_an_event_deleted_while_encoded_is_not_stored(database: Database, queue: Queue) -> None:
    """And the queue forgets it."""
    database.insert("a", "b")
    claim = claimed(queue)
    events = queue.read(claim)
    database.rows("delete from public.iot_events where message = 'a'")

    stored = queue.write(claim.lease, events, [vector_of(e.text) for e in events], MODEL)

    assert len(stored) == 1
    assert len(database.embedded()) == 1
    assert database.queue() == []


def test_an_event_deleted_and_inserted_again_with_its_id_is_embedded_anew(
    database: Database, queue: Queue
) -> None:
    """The old vector does not become that of the new event."""
    (event_id,) = database.insert("old")
    claim = claimed(queue)
    events = queue.read(claim)
    database.rows("delete from public.iot_events")
    database.insert_as(event_id, "new")

    assert not queue.write(claim.lease, events, [vector_of(events[0].text)], MODEL)

    claim = claimed(queue)
    store(queue, claim, queue.read(claim))
    database.assert_invariant()


def test_what_is_new_is_claimed_together_with_its_text(
    database: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round trip less from commit to vector; what was in the queue before is read anew."""
    database.insert("in the queue")
    unread(queue)
    database.rows("update public.iot_events set message = 'in the queue, changed'")
    ids = database.insert("new", "also new")
    claim = claimed(queue)

    with monkeypatch.context() as patch:
        patch.setattr(queries, "READ", queries.READ + " and false")
        events = queue.read(claim)

    assert {event.event_id for event in events} == set(ids)
    assert len(claim.event_ids) == 3
    assert len(store(queue, claim, queue.read(claim))) == 3
    database.assert_invariant()


def test_a_claim_pairs_the_version_with_the_text_it_read(database: Database, queue: Queue) -> None:
    """A change between claim and read is seen whole: both its version and its text."""
    database.insert("old")
    claim = unread(queue)
    database.rows("update public.iot_events set message = 'new'")

    (event,) = queue.read(claim)

    assert event.text.endswith("new")
    assert store(queue, claim, queue.read(claim)) == claim.event_ids


def test_a_change_of_a_claimed_event_takes_the_claim_away(database: Database, queue: Queue) -> None:
    """Once another worker has taken the change; its version and lease fence the first one out."""
    database.insert("old")
    first = unread(queue)
    late = queue.read(first)
    database.rows("update public.iot_events set message = 'new'")
    second = claimed(queue)
    # The text of the first claim is that of the event again, and still the claim is gone.
    database.rows("alter table public.iot_events disable trigger user")
    database.rows("update public.iot_events set message = 'old'")

    assert not queue.write(first.lease, late, [vector_of(late[0].text)], MODEL)

    assert queue.read(first) == []
    assert second.event_ids == first.event_ids
    assert [row.version for row in database.queue()] == [2]


def test_changes_that_were_rolled_back_or_are_not_committed_are_passed_by(
    database: Database, queue: Queue
) -> None:
    """And those committed behind the place where the last claim ended are found."""
    with database.session() as slow, database.session() as other:
        with slow.transaction(), other.transaction(force_rollback=True):
            insert = (
                "insert into public.iot_events (device_id, event_type, severity) "
                "values ('d', 't', 's') returning id"
            )
            row = slow.execute(insert).fetchone()
            other.execute(insert)
            ids = database.insert("a", "b", "c")
            assert [claimed(queue, 2).event_ids, claimed(queue, 2).event_ids] == [ids[:2], ids[2:]]
            assert queue.claim(2) is None
            database.insert("d")
            claimed(queue, 2)
        assert row is not None

    assert claimed(queue, 2).event_ids == [row[0]]


@pytest.mark.parametrize("mover", ["take", "sweep"])
def test_who_moves_events_into_the_queue_does_so_in_the_order_of_their_ids(
    database: Database, mover: str
) -> None:
    """A peer that does the same at the same time would end in a deadlock."""
    event_ids = database.insert(*"abcde")
    database.forget_queue()
    if mover == "take":
        # From the last to the first, as they may be committed.
        for event_id in reversed(event_ids):
            database.rows("insert into listener.change (event_id) values (%s)", event_id)
    put = "insert into listener.queue (event_id) values (%s)"
    with (
        database.session() as peer,
        database.service_session("mover") as conn,
        ThreadPoolExecutor(1) as thread,
    ):
        queue = Queue(conn, database.settings, None)
        # Else it might be the peer that loses the deadlock.
        peer.execute("set lock_timeout = '1s'; set deadlock_timeout = '1min'")
        with peer.transaction():
            peer.execute(put, [event_ids[0]])
            moved = thread.submit(
                lambda: queue.claim(10) if mover == "take" else queue.sweep(MODEL, None, 10)
            )
            wait_until(lambda: database.waits("mover"))
            for event_id in event_ids[1:]:
                peer.execute(put, [event_id])
        moved.result()


def test_what_a_peer_queues_during_a_sweep_is_not_queued_twice(database: Database) -> None:
    """Nor does the sweep fail."""
    (event_id,) = database.insert("a")
    database.forget_queue()
    with (
        database.session() as peer,
        database.service_session("mover") as conn,
        ThreadPoolExecutor(1) as thread,
    ):
        queue = Queue(conn, database.settings, None)
        with peer.transaction():
            peer.execute("insert into listener.queue (event_id) values (%s)", [event_id])
            swept = thread.submit(queue.sweep, MODEL, None, 10)
            wait_until(lambda: database.waits("mover"))

        assert swept.result().queued == 0


def test_slow_takes_put_off_no_look_at_late_commits_beyond_the_poll(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the settings promise."""
    database.insert("a")
    real = Queue._take

    def slow(*arguments: Any) -> list[Any]:
        now[0] += 30.0
        return real(*arguments)

    now = [1000.0]
    monkeypatch.setattr("listener.queue.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Queue, "_take", slow)
    with database.service_session() as conn:
        queue = Queue(conn, database.settings, None)
        now[0] += 10.0
        began = now[0]

        queue.claim_changes(10)

        assert queue._next_look_back == began + database.settings.poll_seconds


def test_retries_have_their_turn_in_a_flood_of_changes(database: Database, queue: Queue) -> None:
    """And backfill has none while changes come."""
    (old,) = database.insert("old")
    database.forget_queue()
    queue.sweep(MODEL, None, 10)
    first, second = database.insert("given back", "given back, too")
    queue.release(claimed(queue, 2).lease, [first, second])
    a, b, c = database.insert("a", "b", "c")

    order = [claimed(queue, 1).event_ids[0] for _ in range(6)]

    assert order == [first, a, second, b, c, old]


def test_retries_have_their_turn_in_a_stream_of_changes_too(
    database: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never ceases, and never fills a claim."""
    monkeypatch.setattr("listener.queue._LOOK_BACK_SECONDS", 0.05)
    (first,) = database.insert("given back")
    queue.release(claimed(queue).lease, [first])

    def retried() -> bool:
        database.insert("another")
        return first in claimed(queue).event_ids

    wait_until(retried)


def test_a_flood_of_changes_looks_for_retries_once_if_there_are_none(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the next look back, which has a turn for them."""
    monkeypatch.setattr("listener.queue._LOOK_BACK_SECONDS", 60.0)
    database.insert(*"abcde")
    asked = []

    with database.service_session() as conn:
        queue = Queue(conn, database.settings, None)
        execute = queue._execute

        def noting(statement: str, **parameters: object) -> list[object]:
            asked.append(statement)
            return execute(statement, **parameters)

        monkeypatch.setattr(queue, "_execute", noting)
        for _ in range(5):
            claimed(queue, 1)

    assert asked.count(queries.CLAIM) == 1


def test_what_is_committed_late_has_its_turn_in_a_stream_of_changes(
    database: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies before what was taken, and something always lies behind."""
    monkeypatch.setattr("listener.queue._LOOK_BACK_SECONDS", 0.05)
    insert = (
        "insert into public.iot_events (device_id, event_type, severity, message) "
        "values ('d', 't', 's', 'late') returning id"
    )
    with database.session() as writer, writer.transaction():
        row = writer.execute(insert).fetchone()
        database.insert("early")
        claimed(queue)
    assert row is not None

    def taken() -> bool:
        database.insert("another")
        return row[0] in claimed(queue).event_ids

    wait_until(taken)


def test_a_look_at_a_long_backfill_reads_little_of_it(database: Database) -> None:
    """Each worker looks every 1.2 s."""
    database.rows(
        "insert into listener.queue (event_id, lane, due_at) "
        "select n, 1, now() - interval '1 s' from generate_series(1, 50000) n"
    )
    database.rows("analyze listener.queue")

    with database.service_session() as conn:
        conn.execute(queries.SERVICE_SESSION)
        parameters = {"lock_class": LOCK_CLASS, "worker": None}
        explain = f"explain (analyze, buffers, format json) {queries.BEAT}"
        row = conn.execute(explain.encode(), parameters).fetchone()

    assert row is not None
    plan = row[0][0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 100


def test_live_events_go_before_backfill_and_backfill_goes_newest_first(
    database: Database, queue: Queue
) -> None:
    """A dashboard looks at the present first."""
    old = database.insert("1", "2", "3")
    database.forget_queue()
    queue.sweep(MODEL, None, 10)
    live = database.insert("4")

    order = [claimed(queue, 1).event_ids[0] for _ in range(4)]

    assert order == [*live, *reversed(old)]


def test_a_failed_event_is_due_again_later_and_parked_in_the_end(database: Database) -> None:
    """Its mates are stored; its reason is kept."""
    database = database.with_settings(max_attempts=3)
    good_a, bad, good_b = database.insert("a", "raise", "b")

    with serving(database):
        wait_until(database.parked)

    (row,) = database.queue()
    assert (row.event_id, row.attempts, row.is_claimed, row.is_parked) == (bad, 3, False, True)
    assert "can't be encoded" in row.error
    assert set(database.embedded()) == {good_a, good_b}


@pytest.mark.parametrize(("attempts", "seconds"), [(1, 5), (2, 10), (5, 80), (20, 3600)])
def test_the_wait_after_a_failure_doubles_up_to_an_hour(
    database: Database, caplog: pytest.LogCaptureFixture, attempts: int, seconds: float
) -> None:
    """Give or take a half, so that what failed together is not tried together."""
    settings = database.with_settings(max_attempts=100, retry_seconds=5.0).settings
    (event_id,) = database.insert("bad")
    with database.service_session() as conn:
        queue = Queue(conn, settings, None)
        claim = claimed(queue)
        database.rows("update listener.queue set attempts = %s", attempts)

        queue.fail(claim.lease, [event_id], "why")

    (record,) = (r for r in caplog.records if r.msg == "event_failed")
    assert seconds * 0.5 <= record.__dict__["fields"]["retry_in_seconds"] <= seconds * 1.5


def test_a_reason_that_a_text_column_cannot_hold_is_kept_as_escapes(
    database: Database, queue: Queue
) -> None:
    """Libraries quote what they were given, however broken."""
    database.insert("a")
    claim = claimed(queue)

    assert queue.fail(claim.lease, claim.event_ids, "byte \0 and \udcff") == 1

    assert database.queue()[0].error == "byte \\x00 and \\udcff"


def test_a_long_reason_is_cut(database: Database, queue: Queue) -> None:
    """A library may quote all that it was given."""
    database.insert("a")
    claim = claimed(queue)

    queue.fail(claim.lease, claim.event_ids, "x" * 5000)

    assert database.queue()[0].error == "x" * 1000


@pytest.mark.parametrize("text", ["nan", "zero"])
def test_a_vector_that_is_no_unit_vector_never_reaches_the_table(
    database: Database, text: str
) -> None:
    """NaN and zero are the event's failure, not a search result."""
    database = database.with_settings(max_attempts=1)
    bad, good = database.insert(text, "good")

    with serving(database):
        wait_until(database.parked)

    assert set(database.embedded()) == {good}
    assert [row.event_id for row in database.queue()] == [bad]


def test_a_broken_model_parks_nothing_and_is_waited_for(database: Database) -> None:
    """No event is to blame when even a known text fails."""
    embedder = TinyEmbedder(is_broken=True)
    database = database.with_settings(poll_seconds=0.1, max_attempts=2)
    database.insert("a", "b")

    with serving(database, embedder):
        wait_until(lambda: database.value("select last_value from listener.lease_token") > 4)
        assert not database.parked()
        embedder.is_broken = False

        database.wait_for_rest()

    assert len(database.embedded()) == 2


def test_an_edited_parked_event_is_tried_again(database: Database) -> None:
    """A new text is a new chance."""
    database = database.with_settings(max_attempts=1)
    database.insert("raise")
    with serving(database):
        wait_until(database.parked)

        database.rows("update public.iot_events set message = 'good'")

        wait_until(database.embedded)
    assert database.queue() == []


def test_events_of_a_dead_worker_are_tried_in_small_groups_then_alone(
    database: Database, queue: Queue
) -> None:
    """The one that kills the process is found while its mates finish."""
    deadly, *mates = database.insert("deadly", *map(str, range(63)))
    sizes = []
    while len(database.embedded()) < len(mates):
        claim = claimed(queue, 64)
        if deadly in claim.event_ids:
            sizes.append(len(claim.event_ids))
            # Its worker died: the lease stays, the events are due again.
            database.rows("update listener.queue set due_at = queued_at where lease is not null")
        else:
            store(queue, claim, queue.read(claim))

    assert sizes[:2] == [64, 16]
    assert set(sizes[2:]) <= {1}
    assert set(database.embedded()) == set(mates)


def test_a_live_event_of_a_dead_worker_goes_before_a_backfilled_one(
    database: Database, queue: Queue
) -> None:
    """However much longer the other has waited."""
    (old,) = database.insert("old")
    database.forget_queue()
    queue.sweep(MODEL, None, 10)
    (live,) = database.insert("live")
    assert [claimed(queue).event_ids, claimed(queue).event_ids] == [[live], [old]]
    database.rows("update listener.queue set due_at = queued_at")

    assert [claimed(queue, 4).event_ids, claimed(queue, 4).event_ids] == [[live], [old]]


def test_a_change_of_an_event_whose_worker_died_does_not_mix_it_with_others(
    database: Database, queue: Queue
) -> None:
    """A text that kills, and changes before the next worker is there, would never be found."""
    killer, _ = database.insert("kills", "mate")
    claimed(queue)
    database.rows("update listener.queue set due_at = now()")
    database.rows("update public.iot_events set message = 'kills, too' where id = %s", killer)
    (new,) = database.insert("new")

    first, second, third = claimed(queue, 8), claimed(queue, 8), queue.claim(8)

    assert first.event_ids == [new]
    assert (second.is_suspect, len(second.event_ids)) == (True, 2)
    assert third is None
    texts = {event.event_id: event.text.split()[-1] for event in queue.read(second)}
    assert texts[killer] == "too"
    assert {row.attempts for row in database.queue()} == {1, 2}


def test_a_holder_that_lives_is_not_blamed_for_a_change_that_was_taken(
    database: Database, queue: Queue
) -> None:
    """Its lease ran out, so its event was left to be claimed anew."""
    (event_id,) = database.insert("old")
    claim = claimed(queue)
    events = queue.read(claim)
    database.rows("update listener.queue set due_at = now()")
    database.rows("update public.iot_events set message = 'new'")
    assert queue.claim_changes(8) is None

    assert store(queue, claim, events) == []

    assert database.queue() == [Queued(event_id, version=2)]


def test_an_attempt_at_a_text_of_before_fails_nothing_once_the_lease_is_over(
    database: Database, queue: Queue
) -> None:
    """A worker that was stopped for long would park the text of now untried."""
    (event_id,) = database.insert("refused")
    zombie = claimed(queue)
    database.rows("update listener.queue set due_at = now(), attempts = 5")
    database.rows("update public.iot_events set message = 'good'")
    assert queue.claim_changes(8) is None
    queue.extend(zombie.lease, zombie.event_ids)

    assert queue.fail(zombie.lease, zombie.event_ids, "refused") == 0

    assert database.queue() == [Queued(event_id, version=2, attempts=5, is_claimed=True)]


def test_an_event_whose_worker_died_is_claimed_where_its_change_is_all_there_is(
    database: Database, queue: Queue
) -> None:
    """The change alone gives nothing to claim."""
    (event_id,) = database.insert("kills")
    claimed(queue)
    database.rows("update listener.queue set due_at = now()")
    database.rows("update public.iot_events set message = 'kills, too'")

    claim = claimed(queue)

    assert claim.is_suspect
    assert database.queue() == [Queued(event_id, version=2, attempts=2, is_claimed=True)]


def test_an_event_that_was_on_every_attempt_when_its_worker_died_is_parked(
    database: Database, queue: Queue
) -> None:
    """Visibly, with the reason."""
    database.insert("deadly")
    for _ in range(database.settings.max_attempts):
        claimed(queue)
        database.rows("update listener.queue set due_at = now()")

    claim = claimed(queue)

    assert claim.event_ids == []
    (row,) = database.queue()
    assert row.is_parked
    assert row.error == "its worker died or lost its lease on every attempt"


def test_a_text_that_is_parked_untried_has_not_the_error_of_the_one_before(
    database: Database, queue: Queue
) -> None:
    """Whose worker died on its last attempt, and which changed before the next worker."""
    (event_id,) = database.insert("refused")
    for _ in range(database.settings.max_attempts - 1):
        queue.fail(claimed(queue).lease, [event_id], "refused")
        database.rows("update listener.queue set due_at = now()")
    claimed(queue)
    database.rows("update listener.queue set due_at = now()")
    database.rows("update public.iot_events set message = 'good'")

    claim = claimed(queue)

    assert claim.event_ids == []
    (row,) = database.queue()
    assert row.is_parked
    assert row.error == "its worker died or lost its lease on every attempt"


def test_a_writer_holding_an_event_does_not_stall_its_batch_mates(
    database: Database, queue: Queue
) -> None:
    """Rows locked by an open transaction are skipped, not waited for."""
    held, free = database.insert("held", "free")
    claim = claimed(queue)
    with database.session() as writer, writer.transaction():
        writer.execute("delete from public.iot_events where id = %s", [held])

        stored = store(queue, claim, queue.read(claim))

        assert stored == [free]
    database.rows("update listener.queue set due_at = now()")
    assert queue.read(claimed(queue)) == []
    assert database.queue() == []
    database.assert_invariant()


def test_an_event_that_a_writer_holds_is_left_alone_for_a_while(
    database: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed again at once it would be encoded again and again until the writer lets go."""
    monkeypatch.setattr("listener.queue._LATER_SECONDS", 3600.0)
    database.insert("held")
    claim = claimed(queue)
    events = queue.read(claim)
    with database.session() as writer, writer.transaction():
        writer.execute("select from public.iot_events for update")

        assert store(queue, claim, events) == []

    assert queue.claim(1) is None
    assert [(row.attempts, row.is_claimed) for row in database.queue()] == [(0, False)]


def test_a_sweep_queues_what_is_missing_outdated_or_of_another_model_and_nothing_twice(
    database: Database, queue: Queue
) -> None:
    """The anti-join finds what triggers missed; a second sweep writes nothing."""
    missing, other_text, other_model, _current = database.insert("a", "b", "c", "d")
    claim = claimed(queue)
    store(queue, claim, queue.read(claim))
    database.rows("delete from public.event_embeddings where event_id = %s", missing)
    database.rows(
        "update public.event_embeddings set content_hash = '' where event_id = %s",
        other_text,
    )
    database.rows(
        "update public.event_embeddings set model = 'x' where event_id = %s",
        other_model,
    )

    pages = [queue.sweep(MODEL, None, 10), queue.sweep(MODEL, None, 10)]

    assert [(page.scanned, page.queued) for page in pages] == [(4, 3), (4, 0)]
    assert [row.event_id for row in database.queue()] == [missing, other_text, other_model]


def test_a_sweep_in_pages_sees_every_event_once(database: Database, queue: Queue) -> None:
    """The end of a page is the beginning of the next, also where times are equal."""
    ids = database.insert(*map(str, range(25)))
    database.forget_queue()
    start, scanned = None, 0
    while True:
        page = queue.sweep(MODEL, start, 7)
        start, scanned = page.next_from, scanned + page.scanned
        if start is None:
            break

    assert scanned == 25
    assert [row.event_id for row in database.queue()] == ids


def test_a_backfill_that_is_given_back_stays_in_its_order(database: Database, queue: Queue) -> None:
    """Newest first, as before."""
    *_, newest = database.insert("a", "b", "c")
    database.forget_queue()
    queue.sweep(MODEL, None, 10)
    claim = claimed(queue, 1)

    queue.release(claim.lease, claim.event_ids)

    assert claim.event_ids == claimed(queue, 1).event_ids == [newest]


def test_backfill_takes_no_more_than_the_last_n(database: Database) -> None:
    """N is the operator's limit."""
    ids = database.insert(*map(str, range(30)))
    database.forget_queue()

    with serving(database.with_settings(backfill_last_n=10)):
        wait_until(lambda: len(database.embedded()) >= 10)
        wait_until(lambda: is_asleep(database))
        database.wait_for_rest()

    assert sorted(database.embedded()) == ids[-10:]


def test_a_retried_event_has_all_its_attempts_again(database: Database) -> None:
    """retry puts a parked event back as if it were new."""
    first, second = database.insert("raise", "raise too")
    database.park(first, second)

    retried = retry(database.conn, [first])

    assert retried == [first]
    assert [(row.attempts, row.is_parked) for row in database.queue()] == [(0, False), (5, True)]


def test_a_retried_event_tells_of_no_error(database: Database) -> None:
    """The last one that status shows would else be of what somebody has put right."""
    database.park(*database.insert("a"))

    retry(database.conn, None)

    assert database.value("select last_error from listener.status") is None


def test_a_change_of_a_parked_event_begins_it_anew(database: Database, queue: Queue) -> None:
    """With all its attempts, no error of the text before, and no age but that of the change."""
    database.park(*database.insert("a"))
    database.rows("update listener.queue set queued_at = now() - interval '1 day'")
    database.rows("update public.iot_events set message = 'b'")

    claimed(queue)

    (row,) = database.queue()
    assert (row.attempts, row.is_claimed, row.error) == (1, True, None)
    assert database.value("select now() - queued_at < interval '1 h' from listener.queue")


def test_a_change_of_an_event_that_waits_for_a_backfill_makes_it_live(
    database: Database, queue: Queue
) -> None:
    """Somebody waits for it now."""
    database.insert("a")
    database.forget_queue()
    queue.sweep(MODEL, None, 10)
    database.rows("update public.iot_events set message = 'b'")

    claimed(queue)

    assert [row.lane for row in database.queue()] == [0]


def test_an_event_has_waited_since_its_first_change(database: Database, queue: Queue) -> None:
    """One that changes all the time would else never look late."""
    database.insert("a")
    database.rows("update listener.change set changed_at = now() - interval '1 h'")
    database.rows("update public.iot_events set message = 'b'")

    claimed(queue)

    assert database.value("select now() - queued_at > interval '30 min' from listener.queue")


def test_an_event_that_is_parked_for_its_deaths_keeps_an_earlier_error(
    database: Database, queue: Queue
) -> None:
    """It says more than that the worker died; and no more attempts are told than it had."""
    database.insert("deadly")
    claim = claimed(queue)
    queue.fail(claim.lease, claim.event_ids, "why")
    for _ in range(database.settings.max_attempts):
        database.rows("update listener.queue set due_at = now()")
        queue.claim(10)

    (row,) = database.queue()
    assert (row.attempts, row.is_parked, row.error) == (database.settings.max_attempts, True, "why")


def test_no_latency_is_below_0(database: Database, queue: Queue) -> None:
    """A clock may be set back, and to a scrape a sum that falls is another process's."""
    database.insert("a")
    database.rows("update listener.change set changed_at = now() + interval '1 h'")
    before = counters.commit_to_vector.total
    claim = claimed(queue)

    store(queue, claim, queue.read(claim))

    assert database.embedded()
    assert counters.commit_to_vector.total == before


def test_a_sweep_leaves_alone_what_waits_as_a_change(database: Database, queue: Queue) -> None:
    """It would count what is on its way already."""
    database.insert("a")

    assert queue.sweep(MODEL, None, 10).queued == 0


def test_the_embedding_of_an_event_that_comes_back_meanwhile_is_no_orphan(
    database: Database, queue: Queue
) -> None:
    """With its id, and embedded anew, while the search for orphans runs."""
    (event_id,) = database.insert("first")
    claim = claimed(queue)
    store(queue, claim, queue.read(claim))
    # Nothing cascades.
    database.rows("set session_replication_role = replica")
    database.rows("delete from public.iot_events")
    with (
        database.session() as writer,
        database.session("orphans") as conn,
        ThreadPoolExecutor(1) as thread,
    ):
        with writer.transaction():
            writer.execute("select from public.event_embeddings for update")
            deleted = thread.submit(delete_orphans, conn)
            wait_until(lambda: database.waits("orphans"))
            database.insert_as(event_id, "second", writer)
            peer = Queue(writer, database.settings, None)
            claim = claimed(peer)
            assert store(peer, claim, peer.read(claim)) == [event_id]

        assert deleted.result() == 0
    database.assert_invariant()


def test_two_hundred_updates_of_one_row_are_one_queue_row_and_the_last_text(
    database: Database, queue: Queue
) -> None:
    """A repeated change bumps the version."""
    (event_id,) = database.insert("0")
    claimed(queue)
    for number in range(200):
        database.conn.execute("update public.iot_events set message = %s", [f"text {number}"])

    claims = [claimed(queue, 150).event_ids, claimed(queue, 150).event_ids]
    assert claims == [[event_id], [event_id]]
    assert [(row.event_id, row.version) for row in database.queue()] == [(event_id, 3)]
    database.rows("update public.iot_events set message = 'text 199 '")
    database.rows("update public.iot_events set message = 'text 199'")
    with serving(database):
        database.wait_for_rest()
    expected = vector_of("event_type: status\nseverity: info\nmessage: text 199")
    np.testing.assert_allclose(database.embedded()[event_id], expected, atol=1e-6)


def test_a_text_that_changed_while_triggers_were_off_is_not_given_the_old_vector(
    database: Database, queue: Queue
) -> None:
    """The write compares the text itself, not only what the triggers say of it."""
    database.insert("old")
    claim = claimed(queue)
    events = queue.read(claim)
    database.rows("alter table public.iot_events disable trigger all")
    database.rows("update public.iot_events set message = 'new'")

    assert not queue.write(claim.lease, events, [vector_of(events[0].text)], MODEL)

    assert database.embedded() == {}
    assert queue.read(wait_until(lambda: queue.claim(1)))[0].text.endswith("new")


@pytest.mark.parametrize(
    "removal", ["delete from public.iot_events", "truncate public.iot_events cascade"]
)
def test_removed_events_leave_the_queue_unencoded(
    database: Database, queue: Queue, removal: str
) -> None:
    """Whether they waited, were claimed, or were parked."""
    database.insert("parked", "claimed")
    claim = claimed(queue)
    database.rows("update listener.queue set due_at = 'infinity' where event_id = 1")
    database.insert("waiting")

    database.rows(removal)

    assert queue.write(claim.lease, [Event(2, 1, "")], [vector_of("")], MODEL) == set()
    with serving(database) as service:
        wait_until(lambda: database.queue() == [])
    assert service.embedder.encoded == []


@pytest.mark.parametrize(
    "ended_by",
    ["update listener.queue set lease = lease + 1", "update listener.queue set due_at = now()"],
)
def test_a_claim_that_is_over_takes_no_deleted_event_out_of_the_queue(
    database: Database, queue: Queue, ended_by: str
) -> None:
    """It may be back with its id, taken anew, and not be seen yet."""
    database.insert("a")
    claim = claimed(queue)
    database.rows("delete from public.iot_events")
    database.rows(ended_by)

    assert store(queue, claim, queue.read(claim)) == []

    assert database.queue()


def test_an_insert_over_the_row_of_a_deleted_event_is_neither_discarded_nor_parked(
    database: Database, queue: Queue
) -> None:
    """The old row is still there, and a worker looks at it before the insert is committed."""
    for parked in (False, True):
        event_id = database.insert("first")[0]
        first = unread(queue)
        if parked:
            database.rows("update listener.queue set due_at = 'infinity', error = 'of the first'")
        database.rows("delete from public.iot_events")
        with database.session() as writer, writer.transaction():
            database.insert_as(event_id, "second", writer)
            assert queue.read(first) == []
            assert queue.claim(10) is None

        (event,) = queue.read(claimed(queue))

        assert event.text.endswith("second")
        database.rows("delete from public.iot_events")
        database.forget_queue()


@pytest.mark.parametrize(
    ("statement", "parameters", "scans"),
    [
        (queries.TAKE, {"position": "(9,1)"}, ["Tid Range Scan on change"]),
        (
            queries.TAKE_AND_READ,
            {"position": "(9,1)"},
            ["Tid Range Scan on change", "iot_events_pkey on iot_events"],
        ),
        (queries.CLAIM, {"live_only": False, "most_deaths": 5}, ["queue_lane_due_at_idx"]),
    ],
    ids=["changes", "changes and texts", "queue"],
)
def test_a_claim_reads_no_more_than_it_needs(
    database: Database, statement: str, parameters: dict[str, object], scans: list[str]
) -> None:
    """Changes from where the last claim ended, the queue and iot_events by their index or never."""
    database.insert(*["a"] * 10_000)
    database.rows("insert into listener.queue (event_id) select generate_series(1, 10000)")
    database.rows("analyze")
    common = {"events": 9, "lease_seconds": 9.0, "worker": None}

    rows = database.conn.execute(f"explain {statement}".encode(), {**common, **parameters})

    plan = "\n".join(line for (line,) in rows)
    assert all(scan in plan for scan in scans)
    assert "Seq Scan" not in plan
    assert ("iot_events" in plan) == ("listener.event" in statement)


def test_no_statement_reads_events_or_vectors_whole_but_what_looks_at_all(
    database: Database,
) -> None:
    """Each by a key or an index; what a function does inside is not seen."""
    database.insert(*["a"] * 10_000)
    database.rows(
        "insert into public.event_embeddings (event_id, embedding, model, content_hash) "
        "select id, array_fill(0, array[384])::vector, 'm', '' from public.iot_events"
    )
    database.rows("analyze")

    whole = {
        name
        for name, text in STATEMENTS.items()
        if re.search("Seq Scan on (iot_events|event_embeddings)", plan_of(database, text))
    }

    # The first two are of commands; STATUS and GAUGES count vectors one by one up to 100,001.
    assert whole == {"DELETE_ORPHANS", "THROUGHPUT", "STATUS", "GAUGES"}


def plan_of(database: Database, statement: str) -> str:
    """Empty for one that has no plan, as LISTEN."""
    try:
        with database.conn.transaction(force_rollback=True):
            rows = database.conn.execute(f"explain {statement}".encode(), PARAMETERS)
            return "\n".join(line for (line,) in rows)
    except psycopg.errors.SyntaxError:
        return ""


_REWRITE = "alter table public.iot_events alter severity type varchar(40) using severity || ''"


@pytest.mark.parametrize("level", ["read committed", "repeatable read"])
def test_who_waited_for_a_table_to_be_rewritten_does_not_take_it_for_empty(
    database: Database, level: str
) -> None:
    """A snapshot from before such DDL sees none of its rows, whatever the default level is."""
    ids = database.insert("a", "b")
    serve_once(database)
    database.insert("c")
    database.forget_queue()

    def while_it_is_rewritten(run: Callable[[Connection], Any]) -> Any:
        with (
            database.session() as ddl,
            database.session("waiting") as conn,
            ThreadPoolExecutor(1) as thread,
        ):
            conn.execute("select set_config('default_transaction_isolation', %s, false)", [level])
            with ddl.transaction():
                ddl.execute(_REWRITE)
                result = thread.submit(run, conn)
                wait_until(lambda: database.waits("waiting"))
            return result.result()

    def sweep(conn: Connection) -> SweepPage:
        return Queue(conn, database.settings, None).sweep(TinyEmbedder.fingerprint, None, 10)

    assert while_it_is_rewritten(delete_orphans) == 0
    assert while_it_is_rewritten(sweep) == SweepPage(scanned=3, queued=1, next_from=None)
    assert set(database.embedded()) == set(ids)
