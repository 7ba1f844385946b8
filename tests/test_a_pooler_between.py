"""Behind a transaction pooler neither LISTEN nor session locks hold: the service polls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from listener import service
from listener.embedded import Server
from listener.metrics import make_registry
from tests.harness import Database, is_asleep, serving, wait_until
from tests.pooler import needs_pgbouncer, pooled

pytestmark = needs_pgbouncer


@pytest.fixture
def behind_pooler(server: Server, database: Database, open_folder: Path) -> Iterator[Database]:
    """The database as a PgBouncer in transaction mode shows it."""
    with pooled(server, open_folder, "transaction") as port:
        yield database.through(port).with_settings(poll_seconds=0.2)


def test_behind_a_transaction_pooler_events_are_found_by_polling(
    behind_pooler: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The NOTIFY that doesn't come back is noticed, said once, and lived without."""
    with serving(behind_pooler), serving(behind_pooler):
        for number in range(200):
            behind_pooler.insert(f"event {number}")
        behind_pooler.wait_for_rest()
        # Of a shared session, which would keep the lock for good.
        assert not is_asleep(behind_pooler)

    assert len(behind_pooler.embedded()) == 200
    behind_pooler.assert_invariant()
    said = [record.message for record in caplog.records]
    assert said.count("notify_does_not_arrive") == 2


def test_behind_a_transaction_pooler_nothing_is_prepared(
    behind_pooler: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement prepared on one of its servers is unknown to the next, or its name is taken."""
    monkeypatch.setattr(service, "BEAT_SECONDS", 0.01)
    prepared = "select count(*) from pg_prepared_statements"
    with serving(behind_pooler), serving(behind_pooler):
        for number in range(20):
            behind_pooler.insert(f"event {number}")
            behind_pooler.wait_for_rest()

        with behind_pooler.service_session() as other:
            for _ in range(20):
                assert other.execute(prepared).fetchone() == (0,)


def test_without_notify_the_service_does_not_listen_through_a_transaction_pooler(
    behind_pooler: Database,
) -> None:
    """It would be one of the shared sessions that listened, for good."""
    with serving(behind_pooler.with_settings(notify="never")):
        behind_pooler.insert("a")
        wait_until(behind_pooler.embedded)

        assert behind_pooler.value("select count(*) from listener.worker") == 0
        with behind_pooler.service_session() as other:
            for _ in range(20):
                assert other.execute("select pg_listening_channels()").fetchall() == []


def test_behind_a_pooler_no_session_setting_reaches_the_other_clients(
    behind_pooler: Database,
) -> None:
    """What the service would set for its own session stays unset there."""
    with serving(behind_pooler):
        behind_pooler.insert("a")
        wait_until(behind_pooler.embedded)

    with behind_pooler.service_session() as other:
        for _ in range(5):
            assert other.execute("show statement_timeout").fetchone() == ("0",)
            assert other.execute("show synchronous_commit").fetchone() == ("on",)


def test_behind_a_pooler_no_limit_of_a_scrape_reaches_the_other_clients(
    behind_pooler: Database,
) -> None:
    """It ends with the transaction of the scrape."""
    registry = make_registry(behind_pooler.settings)

    wait_until(lambda: registry.get_sample_value("listener_database_up"))

    with behind_pooler.service_session() as other:
        for _ in range(5):
            assert other.execute("show statement_timeout").fetchone() == ("0",)
