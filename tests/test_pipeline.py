"""What is claimed, started and given back while the model works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from listener.claim import EventId
from listener.counters import counters
from listener.encoding import Encoder
from listener.errors import ConnectionLost, EncoderLost
from listener.pipeline import Pipeline
from listener.queue import Queue
from listener.stop import Stop
from tests.harness import Database, TinyEmbedder, serving, wait_until
from tests.misbehaviour import limit_statements, replace_input


@contextmanager
def draining(
    database: Database, embedder: TinyEmbedder, in_hand: dict[int, list[EventId]] | None = None
) -> Iterator[Callable[[Callable[[], object]], int]]:
    """A drain of one worker; its argument is called after each batch."""
    in_hand = {} if in_hand is None else in_hand
    encoder = Encoder(lambda: embedder, 0)
    with database.service_session() as conn:
        queue = Queue(conn, database.settings, None)
        pipeline = Pipeline(database.settings, queue, encoder, Stop(), in_hand)
        yield lambda on_batch: pipeline.drain(lambda _: None, on_batch)
    embedder.may_run.set()
    encoder.close()


def suspect(database: Database, message: str) -> int:
    """An event whose worker died, due again before all others."""
    (event_id,) = database.insert(message)
    database.rows("delete from listener.change where event_id = %s", event_id)
    database.rows(
        "insert into listener.queue (event_id, due_at, lease, attempts) "
        "values (%s, '-infinity', nextval('listener.lease_token'), 1)",
        event_id,
    )
    return event_id


def test_nothing_is_claimed_beside_an_event_whose_worker_died(database: Database) -> None:
    """If it kills this worker too, that costs no other an attempt."""
    suspect(database, "suspect")
    mate = suspect(database, "mate")
    database.rows(
        "update listener.queue set lease = null, attempts = 0, due_at = now() where event_id = %s",
        mate,
    )
    attempts = []

    with draining(database, TinyEmbedder()) as drain:
        drain(lambda: attempts.append([row.attempts for row in database.queue()]))

    assert attempts == [[0], []]


def test_an_event_whose_worker_died_waits_until_the_model_is_through_with_others(
    database: Database,
) -> None:
    """Else what it does to the process, it would do to them."""
    suspect(database, "suspect")
    database.insert("mate")
    embedder = TinyEmbedder()
    encoded = []

    with draining(database.with_settings(batch_events=1), embedder) as drain:
        drain(lambda: encoded.append(len(embedder.encoded)))

    assert encoded == [1, 2]


def test_a_drain_does_not_end_with_a_claim_of_which_all_is_parked(database: Database) -> None:
    """As after MAX_ATTEMPTS was lowered; the suspect behind it is still due."""
    spent, behind = suspect(database, "spent"), suspect(database, "behind")
    database.rows("update listener.queue set lease = null, attempts = 5 where event_id = %s", spent)
    database.rows("update listener.queue set due_at = now() where event_id = %s", behind)

    with draining(database, TinyEmbedder()) as drain:
        drain(lambda: None)

    assert database.parked() == [spent]
    assert set(database.embedded()) == {behind}


def test_the_batches_of_a_claim_are_encoded_the_longest_first(database: Database) -> None:
    """With the last of them the claim is done, and its lease is not extended any more."""
    database.insert(*("word " * n for n in (3, 9, 1, 5)))
    embedder = TinyEmbedder()

    with draining(database.with_settings(batch_tokens=1), embedder) as drain:
        drain(lambda: None)

    assert [text.count("word") for text in embedder.encoded] == [9, 5, 3, 1]


def test_new_events_are_encoded_in_the_order_of_their_claims(database: Database) -> None:
    """Else those that wait would wait for as long as there are newer ones."""
    database.insert(*(f"first {n}" for n in range(6)))
    embedder = TinyEmbedder()
    came: list[list[int]] = []

    def more() -> None:
        if not came:
            came.append(database.insert("second"))

    with draining(database.with_settings(batch_tokens=1), embedder) as drain:
        drain(more)
        drain(more)

    assert ["second" in text for text in embedder.encoded] == [False] * 6 + [True]


def test_what_waits_for_the_model_keeps_its_lease(database: Database) -> None:
    """Else a peer would take it, and it would be encoded twice."""
    database.insert(*(f"of eight words as it so happens, {n}" for n in range(6)))
    embedder = TinyEmbedder()
    embedder.may_run.clear()
    database = database.with_settings(lease_seconds=1.0, batch_tokens=8)
    first_end = "select min(due_at) > %s from listener.queue"

    with serving(database, embedder):
        wait_until(lambda: database.leased() == 6)
        claimed_until = database.value("select max(due_at) from listener.queue")
        wait_until(lambda: database.value(first_end, claimed_until))
        embedder.may_run.set()
        database.wait_for_rest()

    assert len(embedder.encoded) == 6


def test_leases_hold_while_it_is_found_out_which_event_takes_too_long(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a peer would claim its mates as a dead worker's, and encode them again."""
    # Six times, longer than the lease holds; once, and a third of it, by far not so long.
    limit_statements(monkeypatch, "1.5s")
    replace_input(database, "perform pg_catalog.pg_sleep(9)")
    bad, *mates = database.insert("bad", *map(str, range(31)))
    database = database.with_settings(lease_seconds=6.0, max_attempts=1, backfill_last_n=0)
    before = counters.lease_expiries

    with serving(database), serving(database):
        wait_until(lambda: database.parked() == [bad], 60)
        wait_until(lambda: database.embedded().keys() == set(mates))

    assert counters.lease_expiries == before


def test_a_claim_of_events_that_are_gone_makes_the_next_no_smaller(database: Database) -> None:
    """It tells nothing of the model."""
    ids = database.insert(*map(str, range(200)))
    database.rows("insert into listener.queue (event_id) select unnest(%s::bigint[])", ids)
    database.rows("delete from listener.change")
    database.rows("delete from public.iot_events")
    rounds = []

    with draining(database, TinyEmbedder()) as drain:
        drain(lambda: rounds.append(len(database.queue())))

    assert len(rounds) == 4


def test_a_claim_of_one_event_makes_the_next_passes_no_smaller(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one text is alone no tokens are counted, which tells nothing of the model."""
    # Whatever holds this process up for a while.
    monkeypatch.setattr("listener.pipeline._BATCH_SECONDS", 3600.0)
    long = [f"{n} " + "word " * 99 for n in range(64)]
    passes: list[int] = []
    with draining(database, TinyEmbedder()) as drain:
        for texts in (long, long, ["alone"], long):
            database.insert(*texts)
            passes.append(0)

            def count() -> None:
                passes[-1] += 1

            drain(count)

    assert passes[0] > passes[1] > passes[3]


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"batch_events": 2}, [6, 4, 2, 0]),
        ({"batch_events": 2, "batch_tokens": 1}, [7, 6, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_neither_claims_nor_passes_outgrow_the_settings(
    database: Database, limits: dict[str, int], left: list[int]
) -> None:
    """However quick the model was with those before."""
    database.insert(*"abcdefgh")
    found = []

    with draining(database.with_settings(**limits), TinyEmbedder()) as drain:
        drain(lambda: found.append(len(database.queue())))

    assert found == left


@dataclass
class Slow(TinyEmbedder):
    """Takes its time for each batch."""

    seconds: float = 0.7

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        time.sleep(self.seconds)
        return super().encode(texts)


def test_no_lease_of_what_is_written_is_extended(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of events that come one by one there would be hundreds."""
    extended = []
    monkeypatch.setattr(Queue, "extend", lambda _, lease, ids: extended.append((lease, ids)))

    with draining(database.with_settings(lease_seconds=1.0), Slow()) as drain:
        for message in "ab":
            extended.clear()
            event_ids = database.insert(message)
            drain(lambda: None)
            assert {tuple(ids) for _, ids in extended} == {tuple(event_ids)}


def test_however_slow_the_model_is_events_are_claimed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim is to be done in a few seconds, in which there may be none."""
    monkeypatch.setattr("listener.pipeline._CLAIM_SECONDS", 0.0)

    with draining(database, TinyEmbedder()) as drain:
        for message in "ab":
            database.insert(message)
            assert drain(lambda: None) == 1


def test_a_session_keeps_no_list_of_all_its_batches(database: Database) -> None:
    """It may last for months, and what is measured is the model of today."""
    encoder = Encoder(TinyEmbedder, 0)
    with database.service_session() as conn:
        queue = Queue(conn, database.settings, None)
        pipeline = Pipeline(database.settings, queue, encoder, Stop(), {})
        for message in "ab":
            database.insert(message)
            pipeline.drain(lambda _: None, lambda: None)
    encoder.close()

    assert pipeline._done == []


def test_a_batch_is_not_blamed_for_the_time_of_the_one_before(database: Database) -> None:
    """Two slow ones, one after the other, are no hang."""
    database.insert("a", "b")
    database = database.with_settings(encode_seconds=5.5, batch_events=1)

    with draining(database, Slow(seconds=3.0)) as drain:
        assert drain(lambda: None) == 2


def test_what_a_hung_model_has_not_begun_is_given_back(database: Database) -> None:
    """Its own batch keeps the lease, by which it is known for what it did."""
    first, second = database.insert("first"), database.insert("second")
    embedder = TinyEmbedder()
    embedder.may_run.clear()
    database = database.with_settings(batch_events=1, encode_seconds=0.2)

    with draining(database, embedder) as drain, pytest.raises(EncoderLost):
        drain(lambda: None)

    assert [(row.event_id, row.attempts, row.is_claimed) for row in database.queue()] == [
        (*first, 1, True),
        (*second, 0, False),
    ]


def lose_connection(*_: object) -> None:
    raise ConnectionLost("the link is down")


def refuse(*_: object) -> None:
    raise psycopg.errors.RaiseException("not in this hour")


@pytest.mark.parametrize("fails", [lose_connection, refuse])
def test_a_hung_model_ends_the_process_though_nothing_can_be_given_back(
    database: Database, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]
) -> None:
    """A new connection would not make the model return."""
    database.insert("first")
    database.insert("second")
    embedder = TinyEmbedder()
    embedder.may_run.clear()
    monkeypatch.setattr(Queue, "release", fails)
    database = database.with_settings(batch_events=1, encode_seconds=0.2)

    with draining(database, embedder) as drain, pytest.raises(EncoderLost):
        drain(lambda: None)


@pytest.mark.parametrize("step", ["read", "write"])
def test_a_claim_is_in_hand_until_it_is_written(
    database: Database, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """So that it counts no attempt where the connection breaks on the way."""
    event_ids = database.insert("a")
    in_hand: dict[int, list[EventId]] = {}
    monkeypatch.setattr(Queue, step, lose_connection)

    with draining(database, TinyEmbedder(), in_hand) as drain, pytest.raises(ConnectionLost):
        drain(lambda: None)

    assert list(in_hand.values()) == [event_ids]


def test_what_could_not_be_given_back_is_still_in_hand(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next session gives it back."""
    monkeypatch.setattr(Queue, "release", lose_connection)
    in_hand: dict[int, list[EventId]] = {7: [1, 2]}
    encoder = Encoder(TinyEmbedder, 0)
    with database.service_session() as conn:
        queue = Queue(conn, database.settings, None)
        with pytest.raises(ConnectionLost):
            Pipeline(database.settings, queue, encoder, Stop(), in_hand).give_back()
    encoder.close()

    assert in_hand == {7: [1, 2]}


def test_what_was_written_a_while_ago_is_in_hand_no_more(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that a session ever wrote would be given back, claim by claim, at its end."""
    monkeypatch.setattr("listener.pipeline._UNDONE_SECONDS", 0.0)
    in_hand: dict[int, list[EventId]] = {}

    with draining(database, TinyEmbedder(), in_hand) as drain:
        for message in "abc":
            last = database.insert(message)
            drain(lambda: None)

    assert list(in_hand.values()) == [last]
