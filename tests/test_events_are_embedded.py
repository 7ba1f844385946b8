"""From commit to vector, and nothing else than that."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness import Database, is_asleep, serving, vector_of, wait_until
from tests.test_install import install_in

PREFIX = "event_type: status\nseverity: info\nmessage: "


def test_an_inserted_event_has_its_vector_without_waiting_for_a_poll(database: Database) -> None:
    """A sleeping service is woken by the commit."""
    with serving(database):
        wait_until(lambda: is_asleep(database))

        (event_id,) = database.insert("pump running hot")

        vectors = wait_until(database.embedded)
    np.testing.assert_allclose(vectors[event_id], vector_of(PREFIX + "pump running hot"), atol=1e-6)


def test_an_update_of_the_text_gives_the_vector_of_the_new_text(database: Database) -> None:
    """The embedding follows the event."""
    with serving(database):
        (event_id,) = database.insert("door shut")
        database.wait_for_rest()

        database.rows("update public.iot_events set message = 'door open'")

        database.wait_for_rest()
    np.testing.assert_allclose(
        database.embedded()[event_id], vector_of(PREFIX + "door open"), atol=1e-6
    )


def test_an_update_of_another_column_encodes_nothing(database: Database) -> None:
    """Only what reads differently is queued."""
    database.insert("door shut")
    with serving(database):
        database.wait_for_rest()

    database.rows("update public.iot_events set device_id = 'pump-2'")

    assert database.queue() == []


@pytest.mark.parametrize(("before", "after"), [(None, "hot"), ("hot", None)])
def test_a_text_that_comes_or_goes_is_a_change(
    database: Database, before: str | None, after: str | None
) -> None:
    """One column stands bare, so that its event has no text while the column is null."""
    install_in(database.conn, ["message"])
    (event,) = database.insert(before)
    database.forget_queue()

    database.rows("update public.iot_events set message = %s", after)

    assert database.rows("select event_id from listener.change") == [(event,)]


def test_a_delete_removes_the_vector(database: Database) -> None:
    """No embedding outlives its event."""
    with serving(database):
        database.insert("door shut")
        database.wait_for_rest()

    database.rows("delete from public.iot_events")

    assert database.embedded() == {}


def test_an_event_deleted_before_its_turn_leaves_the_queue(database: Database) -> None:
    """What is gone is not waited for."""
    database.insert("door shut", "door open")
    database.rows("delete from public.iot_events where message = 'door shut'")

    with serving(database):
        database.wait_for_rest()

    assert len(database.embedded()) == 1
    assert database.queue() == []


def test_identical_texts_are_encoded_once(database: Database) -> None:
    """In a batch and across batches."""
    with serving(database) as service:
        database.insert(*["door shut"] * 50)
        database.wait_for_rest()
        database.insert("door shut", "door open")
        database.wait_for_rest()

    assert sorted(service.embedder.encoded) == [PREFIX + "door open", PREFIX + "door shut"]
    assert len(database.embedded()) == 52


@pytest.mark.parametrize(
    "message",
    [None, "", "pump " * 200_000, "🚰" * 5_000],
    ids=["null", "empty", "a megabyte", "all emoji"],
)
def test_a_text_of_any_size_and_script_gets_its_vector(
    database: Database, message: str | None
) -> None:
    """At the first attempt; an event without a message is an event all the same."""
    with serving(database.with_settings(max_attempts=1)):
        database.insert(message)
        wait_until(database.embedded)

    assert database.queue() == []
    database.assert_invariant()


def test_a_large_copy_is_embedded_whole(database: Database) -> None:
    """One statement, many batches."""
    with serving(database):
        copy = "copy public.iot_events (device_id, event_type, severity, message) from stdin"
        with database.conn.cursor() as cursor, cursor.copy(copy) as rows:
            for number in range(100_000):
                rows.write_row(("pump-1", "status", "info", f"reading {number}"))
        database.wait_for_rest(300)

    assert database.value("select count(*) from public.event_embeddings") == 100_000
    database.assert_invariant()


def test_an_insert_that_inserts_nothing_queues_nothing(database: Database) -> None:
    """on conflict do nothing fires the trigger with an empty table."""
    database.insert("door shut")
    database.forget_queue()

    database.rows(
        "insert into public.iot_events (id, device_id, event_type, severity) "
        "overriding system value select id, 'x', 'x', 'x' from public.iot_events "
        "on conflict do nothing"
    )

    assert database.queue() == []
