"""What everybody stands on: the server that is taken away and given back, and when it was away."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from bench.cluster import Cluster, install_listener, running_cluster
from bench.models import static
from listener.config import Settings
from listener.database import connect
from listener.errors import ConfigError
from listener.model import locate
from tests.harness import free_port
from tests.soak import schema

Connection = psycopg.Connection[Any]

MAX_CONNECTIONS = 60
_DATABASE = "soak"
_RESTART_SECONDS = 30.0


def dice(seed: int, name: str) -> random.Random:
    """A generator of one thread's own, so that the same seed makes the same choices."""
    return random.Random(f"{seed} {name}")  # noqa: S311  chance, not cryptography


class Outages:
    """When the harness itself failed the writers, so that no error of that time is held against us.

    Times are time.monotonic().
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past: list[tuple[float, float]] = []
        self._open: dict[int, float] = {}
        self._number = 0

    @contextmanager
    def during(self) -> Iterator[None]:
        """Until the block ends, and a moment longer, writers may fail."""
        with self._lock:
            self._number += 1
            number, began = self._number, time.monotonic()
            self._open[number] = began
        try:
            yield
        finally:
            with self._lock:
                del self._open[number]
                self._past.append((began, time.monotonic() + 1.0))

    def touch(self, since: float) -> bool:
        """Whether any of them lies between `since` and now."""
        with self._lock:
            return bool(self._open) or any(end >= since for _, end in self._past)


@dataclass
class Ground:
    """A running server with one installed database, and the model that the workers load."""

    cluster: Cluster
    url: str
    model: Path
    fingerprint: str
    outages: Outages = field(default_factory=Outages)
    restarts: threading.Lock = field(default_factory=threading.Lock)

    def connect(self, name: str) -> Connection:
        """An autocommit connection of the harness, by the socket."""
        return psycopg.connect(self.url, autocommit=True, application_name=name, connect_timeout=5)

    def tcp_url(self, port: int) -> str:
        """The database as seen through a port of the loopback."""
        return f"postgresql://postgres@127.0.0.1:{port}/{_DATABASE}"

    def restart(self, mode: str) -> tuple[float, float]:
        """Stop the server in this mode and start it. Returns when it went and when it was back."""
        with self.restarts, self.outages.during():
            went = time.monotonic()
            self.cluster.server.stop(mode)
            self._start()
            return went, time.monotonic()

    def _start(self) -> None:
        """A backend may outlive a crashed server for a moment, and then no new one starts."""
        deadline = time.monotonic() + _RESTART_SECONDS
        while True:
            try:
                return self.cluster.server.start()
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


@contextmanager
def prepared_ground(model: Path | None = None) -> Iterator[Ground]:
    """A server, a database with the listener and the harness's own log; gone with the block.

    Without a `model`, one that costs next to nothing. fsync is off: what dies is the process.
    """
    options = ("fsync=off", f"max_connections={MAX_CONNECTIONS}", "shared_buffers=256MB")
    with running_cluster(*options, port=free_port()) as cluster:
        yield installed(cluster, model or static(cluster.folder))


def installed(cluster: Cluster, model: Path) -> Ground:
    """A new database with the listener and the harness's own log."""
    with cluster.admin() as admin:
        admin.execute(f'create database "{_DATABASE}"'.encode())
    url = cluster.server.url(_DATABASE)
    with connect(Settings(database_url=url), "soak") as conn:
        conn.execute(schema.EVENTS.encode())
    install_listener(url)
    with connect(Settings(database_url=url), "soak") as conn:
        for statement in schema.HARNESS:
            conn.execute(statement)
    fingerprint = locate(Settings(embedding_model=str(model))).fingerprint
    return Ground(cluster, url, model, fingerprint)
