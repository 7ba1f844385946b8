"""Servers of a test's own, to be broken: an installed database there, a standby, a full queue."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest

from listener.config import Settings
from listener.database import Connection, connect
from listener.embedded import Server
from tests.harness import Database, install_demo

# What the fixture `make_server` gives.
MakeServer = Callable[..., Server]


@contextmanager
def installed(server: Server, settings: Settings | None = None) -> Iterator[Database]:
    """The demo's iot_events with the listener installed, by these settings but for the server."""
    settings = settings or Settings(poll_seconds=120.0, retry_seconds=0.05)
    settings = replace(settings, database_url=server.url())
    with connect(settings, "listener-test") as conn:
        install_demo(conn)
        yield Database.owned(settings, conn)


def become_standby(server: Server) -> None:
    """Start it again as a standby, which has no primary; it needs wal_level=replica."""
    server.stop()
    signal_file = server.home / "data" / "standby.signal"
    signal_file.touch()
    # Not root's, where the server runs under another account.
    shutil.chown(signal_file, (server.home / "data").owner())
    server.start()


@contextmanager
def full_notify_queue(database: Database) -> Iterator[Connection]:
    """A session that listens and does not read, until it is closed, and what fills the queue."""
    with database.session() as deaf:
        deaf.execute("listen anything")
        deaf.execute("begin")
        deaf.execute("select 1")
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            _fill_notify_queue(database)
        yield deaf


def _fill_notify_queue(database: Database) -> None:
    for _ in range(1000):
        database.rows("select pg_notify('anything', repeat(random()::text, 300))")
