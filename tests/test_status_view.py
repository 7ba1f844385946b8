"""The view listener.status: the numbers of the metrics in one row of SQL."""

from __future__ import annotations

from listener import queries
from listener.database import read_clock
from listener.status import count_pending_since, read_status
from tests.harness import Database, role, serve_once, serving


def test_the_view_tells_what_waits_by_lane_and_what_is_parked(database: Database) -> None:
    """An event that waits twice counts once; one that is parked and has changed waits."""
    both, parked, changed, claimed, _ = database.insert(
        "both", "parked", "changed", "claimed", "new"
    )
    database.park(parked, changed, both)
    database.rows("update listener.queue set due_at = now(), lane = 1 where event_id = %s", both)
    database.rows("insert into listener.change (event_id) values (%s), (%s)", both, changed)
    database.rows("insert into listener.queue (event_id, lane) values (99, 1), (%s, 0)", claimed)
    database.rows(
        "update listener.queue set queued_at = now() - interval '1 h' where event_id = 99"
    )

    (row,) = database.rows(
        "select pending, pending_live, pending_backfill, parked, workers, last_error, embedded, "
        "oldest_pending_seconds >= 3600 and oldest_live_seconds < 3600 from listener.status"
    )

    assert row == (5, 4, 1, 1, 0, "why", 0, True)
    assert database.value("select pending from listener.status") == database.value(queries.PENDING)


def test_an_event_that_changes_all_the_time_is_as_old_as_the_first_change_that_waits(
    database: Database,
) -> None:
    """By the last one, no alert would tell of a service that is away while devices go on."""
    database.insert("a")
    database.rows("update listener.change set changed_at = now() - interval '100 s'")
    database.rows("update public.iot_events set message = 'b'")

    (found,) = database.rows(
        "select pending_live, oldest_live_seconds, oldest_pending_seconds from listener.status"
    )

    assert found[0] == 1
    assert found[1] >= 100
    assert found[2] >= 100


def test_an_event_that_changes_again_has_waited_since_its_first_change(database: Database) -> None:
    """A backfill that is followed would else end before it is embedded."""
    database.insert("a")
    moment = read_clock(database.conn)

    database.rows("update public.iot_events set message = 'b'")

    assert count_pending_since(database.conn, moment) == 1


def test_status_lists_no_event_as_parked_that_has_changed_since(database: Database) -> None:
    """It counts as pending."""
    parked, changed = database.insert("parked", "changed")
    database.park(parked, changed)
    database.rows("update public.iot_events set message = 'anew' where id = %s", changed)

    status = read_status(database.conn, database.settings)

    assert [event["event_id"] for event in status["parked_events"]] == [parked]
    assert (status["pending"], status["parked"]) == (1, 1)


def test_the_last_error_is_of_an_event_that_will_be_tried_again(database: Database) -> None:
    """What was parked is listed with its own."""
    parked, failed = database.insert("parked", "failed")
    database.park(parked, failed)
    database.rows(
        "update listener.queue set error = 'now', queued_at = now() - interval '1 h', "
        "due_at = now() + interval '1 min' where event_id = %s",
        failed,
    )

    assert database.value("select last_error from listener.status") == "now"


def test_else_the_last_error_is_that_of_the_newest_parked_event(database: Database) -> None:
    """What was parked long ago is known by now."""
    older, newer = database.insert("older", "newer")
    database.park(newer, older)
    database.rows(
        "update listener.queue set error = 'older', queued_at = now() - interval '1 h' "
        "where event_id = %s",
        older,
    )

    assert database.value("select last_error from listener.status") == "why"


def test_the_view_tells_what_is_embedded_and_who_lives(database: Database) -> None:
    """Exact up to the limit of counting; ages are null where nothing waits."""
    database.insert("a", "b")
    statement = (
        "select embedded, embedded_is_estimate, workers, oldest_live_seconds from listener.status"
    )

    with serving(database):
        database.wait_for_rest()
        alive = database.rows(statement)

    assert alive == [(2, False, 1, None)]
    assert database.rows(statement) == [(2, False, 0, None)]


def test_an_estimate_of_what_is_embedded_is_never_below_what_was_counted(
    database: Database,
) -> None:
    """Before the first analyze there is none."""
    definition = database.value("select pg_get_viewdef('listener.status'::regclass)")
    few = definition.replace("100001", "2").replace("100000", "1")
    database.rows(f"create or replace view listener.status as {few}")
    database.insert("a", "b", "c")
    serve_once(database)

    found = database.rows("select embedded, embedded_is_estimate from listener.status")

    assert found == [(2, True)]


def test_the_view_reads_neither_table_of_events_as_a_whole(database: Database) -> None:
    """Embeddings up to a limit, events not at all; for the metrics neither."""
    status, gauges = (
        "\n".join(line for (line,) in database.rows(f"explain (analyze, costs off) {statement}"))
        for statement in (queries.STATUS, queries.GAUGES)
    )

    assert "iot_events" not in status + gauges
    assert "Limit" in status.split("event_embeddings")[0].splitlines()[-2]
    assert "never executed" in gauges.split("event_embeddings")[1].splitlines()[0]


def test_who_watches_needs_no_right_but_the_view(database: Database) -> None:
    """Usage on the schema and select on listener.status."""
    with role(database.conn, "watcher"):
        database.rows("grant usage on schema listener to watcher")
        database.rows("grant select on listener.status to watcher")
        database.rows("set role watcher")

        assert database.value("select pending from listener.status") == 0
        database.rows("reset role")
