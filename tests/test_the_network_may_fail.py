"""A cut, silent, slow or lying network loses nothing, and the service recovers by itself."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from tenacity import wait_fixed

from listener.database import _LIVELINESS, Connection, connect, reconnecting
from listener.embedded import Server
from listener.errors import ConnectionLost
from listener.queue import Queue
from listener.stop import Stop
from tests.harness import (
    DEADLINE_SECONDS,
    Database,
    TinyEmbedder,
    free_port,
    is_asleep,
    serving,
    wait_until,
)
from tests.proxy import Proxy, proxied

# What the product promises for a link that carries nothing and says nothing.
_NOTICED_SECONDS = 15.0
# For how long a busy machine may hold the test up meanwhile.
_STALL_SECONDS = 5.0


@contextmanager
def behind_proxy(server: Server, database: Database) -> Iterator[tuple[Proxy, Database]]:
    """The database as a service sees it through a proxy."""
    assert server.port is not None
    with proxied(server.port) as proxy:
        yield proxy, database.through(proxy.port)


@contextmanager
def served_through(
    server: Server, database: Database, embedder: TinyEmbedder | None = None
) -> Iterator[Proxy]:
    """A service at rest behind a proxy."""
    with (
        behind_proxy(server, database) as (proxy, seen_by_service),
        serving(seen_by_service, embedder),
    ):
        wait_until(lambda: is_asleep(database))
        yield proxy


@pytest.mark.usefixtures("quick_reconnects")
def test_reset_connections_are_replaced(server: Server, database: Database) -> None:
    """RST in the idle service, again and again; what arrives meanwhile is embedded."""
    with served_through(server, database) as proxy:
        for number in range(5):
            proxy.reset()
            database.insert(f"after reset {number}")
            wait_until(lambda: database.is_at_rest() and database.embedded())

        # A sweep that a reset met may queue an event again, blindly.
        wait_until(lambda: is_asleep(database) and database.is_at_rest())
        assert len(database.embedded()) == 5
        database.assert_invariant()


def test_an_answer_that_comes_slowly_is_no_silence(database: Database) -> None:
    """As many large texts over a slow link; each part of it is a sign of life."""
    with connect(database.settings, "slow", answer_seconds=1.0) as conn, conn.cursor() as cursor:
        parts = "select repeat('x', 10_000), pg_sleep(0.3) from generate_series(1, 5)"

        assert len(cursor.execute(parts).fetchall()) == 5


def test_a_client_that_vanishes_in_mid_sweep_leaves_no_transaction_open(
    server: Server, database: Database
) -> None:
    """As a laptop whose lid is closed: others would wait for the locks of its page for long."""
    database.insert("a", "b")
    database.forget_queue()

    def sweep(conn: Connection) -> None:
        Queue(conn, database.settings, None).sweep("another", None, 10)

    with (
        behind_proxy(server, database) as (proxy, seen_by_client),
        seen_by_client.service_session("sweeping") as conn,
        database.session() as ddl,
        ThreadPoolExecutor(1) as thread,
    ):
        with ddl.transaction():
            ddl.execute("lock table public.iot_events in access exclusive mode")
            swept = thread.submit(sweep, conn)
            wait_until(lambda: database.waits("sweeping"))
            proxy.black_hole()

        state = "select state from pg_stat_activity where application_name = 'sweeping'"
        try:
            wait_until(lambda: len(database.queue()) == 2)
            wait_until(lambda: database.value(state) == "idle")
        finally:
            proxy.reset()
        with pytest.raises(ConnectionLost):
            swept.result()


def test_a_black_hole_is_noticed_in_time_and_recovered_from(
    server: Server, database: Database
) -> None:
    """Both connections carry nothing and nobody says so; an event of that time has its vector."""
    with served_through(server, database) as proxy:
        before = workers_pids(database)
        proxy.black_hole()
        database.insert("while the link is dead")
        proxy.heal()

        wait_until(database.embedded, _NOTICED_SECONDS + _STALL_SECONDS)

        assert not before & workers_pids(database, newest=2)


def workers_pids(database: Database, newest: int | None = None) -> set[int]:
    """The backends of the service's connections; those in a black hole live on for a while."""
    rows = database.rows(
        "select pid from pg_stat_activity where datname = current_database() "
        "and application_name in ('listener-work', 'listener-wake') "
        "order by backend_start desc"
    )
    return {pid for (pid,) in rows[:newest]}


@pytest.mark.parametrize("name", ["listener-work", "listener-wake"])
def test_either_connection_alone_in_a_black_hole_is_noticed(
    server: Server, database: Database, name: str
) -> None:
    """The one that works and the one that only listens."""
    with served_through(server, database) as proxy:
        before = workers_pids(database)
        port = database.value(
            "select client_port from pg_stat_activity "
            "where datname = current_database() and application_name = %s",
            name,
        )
        proxy.black_hole(port)

        wait_until(
            lambda: len(workers_pids(database) - before) == 2, _NOTICED_SECONDS + _STALL_SECONDS
        )
        database.insert("after it was noticed")
        wait_until(database.embedded)


def swallow_first_reply(proxy: Proxy, statement: bytes) -> list[bool]:
    """Cut the link at the first answer to a statement with these words. Filled once it happened."""
    cut: list[bool] = []

    def is_first(data: bytes) -> bool:
        if statement in data and not cut:
            cut.append(True)
            return True
        return False

    proxy.swallow_reply_to = is_first
    return cut


def test_a_lost_reply_to_the_write_loses_and_doubles_nothing(
    server: Server, database: Database
) -> None:
    """The commit happened, its reply didn't arrive: the event is stored once and acknowledged."""
    embedder = TinyEmbedder()
    with served_through(server, database, embedder) as proxy:
        cut = swallow_first_reply(proxy, b"done as")
        database.insert("reply lost")
        wait_until(lambda: cut and database.is_at_rest() and database.embedded())
        database.insert("next")
        database.wait_for_rest()

        assert len(database.embedded()) == 2
        assert len(embedder.encoded) == 2


def test_a_lost_reply_to_the_claim_costs_no_event(server: Server, database: Database) -> None:
    """The service doesn't know that it holds a lease; its former session's death frees it."""
    with served_through(server, database) as proxy:
        # A beat on this connection: the last look at the queue is over.
        wait_until(lambda: is_asleep(database) and has_beaten(database))
        cut = swallow_first_reply(proxy, b"with taken as")
        database.insert("claimed by nobody")
        wait_until(lambda: cut and database.embedded())

        database.assert_invariant()
        assert database.value("select last_value from listener.lease_token") == 2


def has_beaten(database: Database) -> bool:
    """A beat was the last that ran on the connection that claims, and it has ended."""
    return bool(
        database.value(
            "select count(*) from pg_stat_activity where datname = current_database() "
            "and application_name = 'listener-work' and state = 'idle' and query like '%dead as%'"
        )
    )


def test_latency_slows_and_breaks_nothing(server: Server, database: Database) -> None:
    """200 ms each way."""
    with served_through(server, database) as proxy:
        proxy.delay_seconds = 0.2
        database.insert(*map(str, range(20)))

        wait_until(lambda: len(database.embedded()) == 20, 60)

        proxy.delay_seconds = 0.0
        assert database.value("select last_value from listener.worker_token") == 1
        database.assert_invariant()


def test_a_database_that_can_not_be_reached_is_waited_for(
    server: Server, database: Database
) -> None:
    """Started before the network is there, the service ends up serving."""
    with behind_proxy(server, database) as (proxy, seen_by_service):
        proxy.refuses = True
        with serving(seen_by_service):
            database.insert("before there was a way")
            wait_until(lambda: proxy.refused >= 2)
            proxy.refuses = False

            wait_until(database.embedded)


def test_a_server_that_accepts_and_says_nothing_is_given_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who connects into a black hole would wait for minutes after it is gone."""
    # The least that the driver takes; the other limits are of a connection that stands.
    shorter = {name: 2 for name in _LIVELINESS if name == "connect_timeout"}
    monkeypatch.setattr("listener.database._LIVELINESS", shorter)
    with ThreadPoolExecutor(1) as thread, socket.create_server(("127.0.0.1", 0)) as silent:
        settings = database.through(silent.getsockname()[1]).settings

        connecting = thread.submit(connect, settings, "listener-test")

        assert isinstance(connecting.exception(DEADLINE_SECONDS), ConnectionLost)


def test_attempts_to_connect_come_soon_at_first_and_never_more_than_ten_seconds_apart() -> None:
    """A blink of the network costs next to nothing, and no outage much after its end."""
    waits: list[float] = []

    class Impatient(Stop):
        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 100:
                self.set()

    def connects() -> None:
        raise ConnectionLost("no route")

    with pytest.raises(ConnectionLost):
        reconnecting(Impatient())(connects)

    assert all(wait <= 0.2 * 2**n for n, wait in enumerate(waits))
    assert 5 < max(waits) <= 10


def test_a_stop_ends_the_wait_between_two_attempts_to_connect(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long the network has been away."""
    monkeypatch.setattr(
        "listener.database.wait_random_exponential", lambda **_: wait_fixed(3 * DEADLINE_SECONDS)
    )
    with serving(database.through(free_port())) as service:
        wait_until(lambda: "connection_lost" in caplog.messages)

        service.stop()
