"""The server that the benchmarks share: fsync on, its own directory, gone at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from listener import install, template
from listener.catalogue import read_facts
from listener.config import Settings
from listener.database import connect
from listener.embedded import Server, binaries


@dataclass(frozen=True)
class Cluster:
    """A running server, and a folder for models, logs and whatever else a run leaves behind."""

    server: Server
    folder: Path

    def admin(self) -> psycopg.Connection[Any]:
        """An autocommit connection to the maintenance database."""
        return psycopg.connect(self.server.url(), autocommit=True)

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        """A database with an empty iot_events for the length of the block. Its URL."""
        identifier = sql.Identifier(name)
        with self.admin() as admin:
            admin.execute(sql.SQL("create database {}").format(identifier))
        try:
            with connect(Settings(database_url=self.server.url(name)), "bench") as conn:
                conn.execute(template.sql_text("demo.sql").encode())
            yield self.server.url(name)
        finally:
            with self.admin() as admin:
                admin.execute(sql.SQL("drop database {} with (force)").format(identifier))


def install_listener(url: str, columns: Sequence[str] | None = None) -> None:
    """What `listener install` does; `columns` None takes the default."""
    with connect(Settings(database_url=url), "bench") as conn:
        install.apply_plan(conn, install.plan_install(conn, read_facts(conn), columns))


@contextmanager
def running_cluster(*options: str, port: int | None = None) -> Iterator[Cluster]:
    """Start a server; stopped and removed when the block ends, however.

    Of default settings but for `options`, name=value; with a `port` it listens on the loopback.
    """
    folder = Path(tempfile.mkdtemp(prefix="listener-bench-"))
    try:
        # For root the server runs under another account, which must get through to its home.
        folder.chmod(0o755)
        options = ("max_connections=100", *options)
        server = Server.prepared(folder / "server", binaries(), port, *options)
        try:
            server.start()
            yield Cluster(server, folder)
        finally:
            if server.is_running():
                server.stop()
    finally:
        shutil.rmtree(folder)
