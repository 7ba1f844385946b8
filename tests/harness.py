"""What the tests share: a database to break, a model that costs nothing, waiting for a state."""

from __future__ import annotations

import atexit
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psycopg
from numpy.typing import NDArray

from listener import install, passes, queries
from listener.catalogue import read_facts
from listener.claim import Claim, Event, EventId
from listener.config import Settings
from listener.counters import counters
from listener.database import Connection, connect
from listener.encoding import Encoder
from listener.queue import Queue
from listener.service import Service
from listener.stop import Stop
from listener.template import sql_text
from listener.vectors import register_vector
from listener.wakeup import GATE_KEY

DEADLINE_SECONDS = 20.0


def free_port() -> int:
    """Below those that the kernel gives to clients, one of which could take it in a restart."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port between 20000 and 32000")


# What the service logs in as: in listener_worker, and nothing else.
SERVICE_ROLE = "listener_service"


def install_demo(conn: Connection) -> None:
    """The demo's iot_events with the listener installed, and the vector type known."""
    conn.execute(sql_text("demo.sql").encode())
    install.apply_plan(conn, install.plan_install(conn, read_facts(conn), None))
    register_vector(conn)
    conn.execute(f"create role {SERVICE_ROLE} login in role listener_worker".encode())


def as_service(url: str) -> str:
    """The same database for the role of the service."""
    assert "//postgres@" in url
    return url.replace("//postgres@", f"//{SERVICE_ROLE}@")


@contextmanager
def role(admin: Connection, name: str, attributes: str = "nologin") -> Iterator[str]:
    """A role for a while; what it has goes with it."""
    admin.execute(f"create role {name} {attributes}".encode())
    try:
        yield name
    finally:
        admin.execute(f"drop owned by {name} cascade".encode())
        admin.execute(f"drop role {name}".encode())


def wait_until(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """The condition's first true value; fails the test if there is none in time."""
    began = time.monotonic()
    deadline = began + seconds
    while not (value := condition()):
        ended = time.monotonic()
        assert ended < deadline, f"not within {seconds} s"
        # To look takes but half the time, or it would hold up what is waited for.
        time.sleep(min(max(0.005, ended - began), 0.5))
        began = time.monotonic()
    return value


def is_waited_for(conn: psycopg.Connection[Any], table: str) -> bool:
    """Whether a session waits for a lock on this table."""
    waiting = "select 1 from pg_locks l where l.relation = %s::regclass and not l.granted"
    return conn.execute(waiting, [table]).fetchone() is not None


def vector_of(text: str) -> NDArray[np.float32]:
    """The unit vector that TinyEmbedder gives for a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    vector = np.random.default_rng(seed).standard_normal(384).astype(np.float32)
    unit: NDArray[np.float32] = vector / np.linalg.norm(vector)
    return unit


@dataclass
class TinyEmbedder:
    """Deterministic and instant. A text with "raise", "nan" or "zero" in it misbehaves so."""

    engine: str = "tiny"
    fingerprint: str = "tests/tiny@1/fp32"
    max_tokens: int | None = 512
    overhead_tokens: int = passes.OVERHEAD_ON_CPU
    encoded: list[str] = field(default_factory=list)
    # Cleared, it holds every encode until it is set again.
    may_run: threading.Event = field(default_factory=threading.Event)
    is_broken: bool = False

    def __post_init__(self) -> None:
        self.may_run.set()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        assert self.may_run.wait(DEADLINE_SECONDS)
        if self.is_broken or any("raise" in text for text in texts):
            raise RuntimeError("this text can't be encoded")
        self.encoded.extend(texts)
        counters.texts_truncated += sum(self.count_tokens(text) > 512 for text in texts)
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> NDArray[np.float32]:
        if "nan" in text:
            return np.full(384, np.nan, np.float32)
        return np.zeros(384, np.float32) if "zero" in text else vector_of(text)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [self.count_tokens(text) for text in texts]

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def claimed(queue: Queue, events: int = 100) -> Claim:
    """A claim of what is due, which must be something."""
    claim = queue.claim(events)
    assert claim is not None
    return claim


def unread(queue: Queue) -> Claim:
    """The same, given back and claimed again: the texts don't come with it any more."""
    claim = claimed(queue)
    queue.release(claim.lease, claim.event_ids)
    return claimed(queue)


def store(queue: Queue, claim: Claim, events: Sequence[Event]) -> list[EventId]:
    """Write what a claim holds as TinyEmbedder would encode it. Returns what was stored."""
    vectors = [vector_of(event.text) for event in events]
    return list(queue.write(claim.lease, events, vectors, TinyEmbedder.fingerprint))


class Queued(NamedTuple):
    """An event in the queue; by default as one that nobody has tried yet."""

    event_id: int
    # 0 while its change is not taken yet.
    version: int = 1
    lane: int = 0
    attempts: int = 0
    # It has a lease, which may be over.
    is_claimed: bool = False
    is_parked: bool = False
    # A text or None.
    error: Any = None


@dataclass
class Database:
    """An installed database of its own for one test, and what devices do to it.

    The service has the role in `settings`, which may do no more than it must. `conn`, and who
    writes events, is the owner of the table, who installed.
    """

    settings: Settings
    conn: Connection
    owner: Settings

    @classmethod
    def owned(cls, owner: Settings, conn: Connection) -> Database:
        """With the service in the role of listener_worker."""
        return cls(replace(owner, database_url=as_service(owner.database_url)), conn, owner)

    def insert(self, *messages: str | None) -> list[int]:
        """Insert events in one statement. Returns their ids."""
        rows = self.conn.execute(
            "insert into public.iot_events (device_id, event_type, severity, message) "
            "select 'pump-1', 'status', 'info', m from unnest(%s::text[]) with ordinality u (m, n) "
            "order by n returning id",
            [list(messages)],
        ).fetchall()
        return [event_id for (event_id,) in rows]

    def insert_as(self, event_id: int, message: str, conn: Connection | None = None) -> None:
        """Insert an event under an id that was deleted; in another session, if one is given."""
        (conn or self.conn).execute(
            "insert into public.iot_events (id, device_id, event_type, severity, message) "
            "overriding system value values (%s, 'pump-1', 'status', 'info', %s)",
            [event_id, message],
        )

    def rows(self, statement: str, *parameters: Any) -> list[Any]:
        """Execute and fetch all; empty if there is nothing to fetch, also for rows of no column."""
        cursor = self.conn.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def value(self, statement: str, *parameters: Any) -> Any:
        """The first column of the first row."""
        return self.rows(statement, *parameters)[0][0]

    def embedded(self) -> dict[int, NDArray[np.float32]]:
        """The vector of every event that has one."""
        rows = self.rows("select event_id, embedding from public.event_embeddings")
        return {event_id: vector.to_numpy() for event_id, vector in rows}

    def queue(self) -> list[Queued]:
        """Each event that is queued, in order of id, also one whose change was not taken yet."""
        rows = self.rows(
            "select event_id, version, lane, attempts, lease is not null, due_at = 'infinity', "
            "error from listener.queue q "
            "where not exists (select from listener.change c where c.event_id = q.event_id) "
            "union all select distinct event_id, 0, 0, 0, false, false, null from listener.change "
            "order by event_id"
        )
        return [Queued(*row) for row in rows]

    def parked(self) -> list[int]:
        """The ids of the events that are parked."""
        return [row.event_id for row in self.queue() if row.is_parked]

    def park(self, *event_ids: int) -> None:
        """As if they had failed for the last time, with the reason 'why'."""
        self.rows("delete from listener.change where event_id = any(%s)", list(event_ids))
        self.rows(
            "insert into listener.queue (event_id, due_at, attempts, error) "
            "select unnest(%s::bigint[]), 'infinity', 5, 'why'",
            list(event_ids),
        )

    def forget_queue(self) -> None:
        """As if nothing had ever been queued."""
        self.rows("delete from listener.change")
        self.rows("delete from listener.queue")

    def terminate(self, name: str) -> None:
        """End the sessions whose application_name is like that."""
        self.rows(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and application_name like %s",
            name,
        )

    def waits(self, name: str) -> bool:
        """Whether a session of this application_name waits for a lock."""
        return bool(
            self.value(
                "select count(*) from pg_stat_activity where datname = current_database() "
                "and application_name = %s and wait_event_type = 'Lock'",
                name,
            )
        )

    def leased(self) -> int:
        """How many events are in a claim that holds."""
        return int(
            self.value(
                "select count(*) from listener.queue "
                "where lease is not null and due_at > now() and due_at < 'infinity'"
            )
        )

    def is_at_rest(self) -> bool:
        """Nothing pending; parked events may be there."""
        return not self.value(queries.PENDING)

    def wait_for_rest(self, seconds: float = DEADLINE_SECONDS) -> None:
        wait_until(self.is_at_rest, seconds)

    def assert_invariant(self, model: str = TinyEmbedder.fingerprint) -> None:
        """Every event has one embedding of its current text by this model, or waits visibly."""
        wrong = self.rows(
            "select e.id from public.iot_events e "
            "left join public.event_embeddings m on m.event_id = e.id and m.model = %s "
            "and m.content_hash = sha256(convert_to(coalesce(listener.embedding_input(e.*), ''), "
            "'UTF8')) "
            "left join listener.waiting w on w.event_id = e.id "
            "left join listener.queue q on q.event_id = e.id "
            "where (m.event_id is null) = (coalesce(w.event_id, q.event_id) is null) "
            "or (q.due_at = 'infinity' and q.error is null)",
            model,
        )
        assert wrong == []
        assert not self.rows(
            "select m.event_id from public.event_embeddings m "
            "where not exists (select from public.iot_events e where e.id = m.event_id)"
        )
        if model == TinyEmbedder.fingerprint:
            self._assert_vectors()

    def _assert_vectors(self) -> None:
        """Current vectors of TinyEmbedder are those of their texts, not of a mate's."""
        rows = self.rows(
            "select t.text, m.embedding from public.iot_events e "
            "join public.event_embeddings m on m.event_id = e.id and m.model = %s "
            "cross join coalesce(listener.embedding_input(e.*), '') as t (text) "
            "where m.content_hash = sha256(convert_to(t.text, 'UTF8')) "
            # Of a longer one the model gets the beginning only.
            "and length(t.text) <= 8192 limit 2000",
            TinyEmbedder.fingerprint,
        )
        found = [(text, vector.to_numpy()) for text, vector in rows]
        assert not [text for text, vector in found if not np.allclose(vector, vector_of(text))]

    def with_settings(self, **changes: Any) -> Database:
        """The same database under other settings."""
        return replace(self, settings=replace(self.settings, **changes))

    def through(self, port: int) -> Database:
        """The same database as the service sees it through a port of the loopback."""
        url = f"postgresql://{SERVICE_ROLE}@127.0.0.1:{port}/{self.conn.info.dbname}"
        return self.with_settings(database_url=url)

    @contextmanager
    def session(self, name: str = "listener-test") -> Iterator[Connection]:
        """Another connection of the owner."""
        with connect(self.owner, name) as conn:
            yield conn

    @contextmanager
    def service_session(self, name: str = "listener-work") -> Iterator[Connection]:
        """A connection as the service opens it."""
        with connect(self.settings, name) as conn:
            yield conn


@dataclass
class RunningService:
    """A service in a thread of the test's process."""

    embedder: TinyEmbedder
    stop_signal: Stop
    thread: threading.Thread

    def stop(self) -> None:
        self.stop_signal.set()
        self.thread.join(DEADLINE_SECONDS)
        assert not self.thread.is_alive()


@contextmanager
def serving(database: Database, embedder: TinyEmbedder | None = None) -> Iterator[RunningService]:
    """Run a service until the block ends; what it raised, the block raises."""
    embedder = embedder or TinyEmbedder()
    settings = database.settings
    encoder = Encoder(lambda: embedder, settings.cache_texts)
    stop, errors = Stop(), []
    service = Service(settings, encoder, stop)

    def run() -> None:
        try:
            service.run()
        except Exception as error:  # noqa: BLE001  raised again in the test's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="service")
    thread.start()
    try:
        yield RunningService(embedder, stop, thread)
    finally:
        stop.set()
        embedder.may_run.set()
        thread.join(DEADLINE_SECONDS)
        encoder.close()
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def serve_once(database: Database) -> None:
    """As `run --once` does: what is due and the last N, and no more."""
    with closing(Encoder(TinyEmbedder, database.settings.cache_texts)) as encoder:
        Service(database.settings, encoder, Stop()).run(once=True)


def is_asleep(database: Database) -> bool:
    """Whether a worker holds the gate, that is, sleeps until a NOTIFY."""
    return bool(
        database.value(
            "select count(*) from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' "
            "and database = (select oid from pg_database where datname = current_database()) "
            "and (classid::bigint << 32 | objid::bigint) = %s and granted",
            GATE_KEY,
        )
    )


@dataclass
class Command:
    """A `listener` process."""

    process: subprocess.Popen[str]
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until the output has this text; fails if the process ends before."""

        def seen() -> bool:
            assert self.process.poll() is None or text in self.output(), self.output()
            return text in self.output()

        wait_until(seen, 60)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def encoded_texts(self) -> int:
        """The sum of what its batches say they encoded."""
        return sum(int(count) for count in re.findall(r"encoded=(\d+)", self.output()))


# What the fixtures `spawn` and `new_database` give.
Spawn = Callable[..., Command]
NewDatabase = Callable[..., AbstractContextManager[str]]


def environment(settings: Settings, **variables: str) -> dict[str, str]:
    """The environment of a `listener` process with these settings."""
    values = {spec.name.upper(): getattr(settings, spec.name) for spec in fields(Settings)}
    defaults = {spec.name.upper(): spec.default for spec in fields(Settings)}
    return {
        # Nothing that somebody has set for a service of their own.
        **{
            name: value
            for name, value in os.environ.items()
            if name not in values and not name.startswith("HF_")
        },
        # The rest is left to the .env of a test.
        **{name: str(value) for name, value in values.items() if value != defaults[name]},
        # Started elsewhere, where no .env lies, it finds the tests' modules all the same.
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **variables,
    }


@cache
def empty_folder() -> str:
    """Where no .env and no module of somebody's lies."""
    folder = tempfile.mkdtemp(prefix="listener-")
    atexit.register(os.rmdir, folder)
    return folder


def listener(
    settings: Settings,
    *arguments: str,
    check: bool = True,
    cwd: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "listener", *arguments],
        env=environment(settings, **variables),
        cwd=cwd or empty_folder(),
        capture_output=True,
        text=True,
        check=check,
        timeout=300,
    )
