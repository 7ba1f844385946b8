"""`listener check`: one line per precondition, with the remedy where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import UUID

import numpy as np
from psycopg.rows import class_row

from listener import queries
from listener.blame import require_input
from listener.catalogue import Facts, read_facts
from listener.checks_link import check_clock, check_notify, check_server, check_tls, no_connection
from listener.claim import Claim, Event, EventId
from listener.config import DIMENSION, Settings
from listener.database import Connection, connect, reading
from listener.embedder import load_embedder
from listener.endpoint import require_metrics
from listener.errors import ListenerError, SchemaError
from listener.finding import Finding
from listener.install import is_outdated, verify
from listener.preflight import events_problem, rights_problem
from listener.queue import Queue
from listener.search import nearest
from listener.status import other_model, read_workers
from listener.worker import rehearse


@dataclass(frozen=True)
class _VectorIndex:
    name: str
    opclass: str
    is_valid: bool
    serves_search: bool


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Every precondition in the order in which the service meets it."""
    yield Finding("settings", "all read and in range")
    fingerprint, model = _check_model(settings)
    yield model
    if settings.metrics_port:
        yield _check_metrics()
    with ExitStack() as stack:
        try:
            work = stack.enter_context(connect(settings, "listener-work-check"))
            wake = stack.enter_context(connect(settings, "listener-wake-check"))
        except ListenerError as error:
            yield no_connection(settings, error)
            return
        try:
            facts = read_facts(work)
        except SchemaError as error:
            yield Finding("rights", str(error), error.exit_code)
            return
        yield Finding("connection", f"{facts.database} as {facts.role}")
        yield check_tls(work)
        server = check_server(facts)
        yield server
        if not server.ok:
            return
        yield check_notify(settings, wake, work)
        yield check_clock(work)
        yield from _check_database(settings, facts, work, fingerprint)


def _check_database(
    settings: Settings, facts: Facts, work: Connection, fingerprint: str | None
) -> Iterator[Finding]:
    yield _check_extension(facts)
    yield _check_events(facts)
    schema = _check_schema(work)
    yield schema
    if not schema.ok:
        return
    yield _check_rights(settings, facts, work)
    yield _check_grants(work)
    yield _check_search(work)
    yield _check_workers(work, fingerprint)


def _check_model(settings: Settings) -> tuple[str | None, Finding]:
    try:
        embedder = load_embedder(settings)
    except ListenerError as error:
        return None, Finding("model", str(error), error.exit_code)
    detail = f"{embedder.fingerprint}, {DIMENSION} numbers, engine {embedder.engine}"
    return embedder.fingerprint, Finding("model", detail)


def _check_metrics() -> Finding:
    # Not whether the port is free: a service that runs has it.
    try:
        require_metrics()
    except ListenerError as error:
        return Finding("metrics", str(error), error.exit_code)
    return Finding("metrics", "the package for METRICS_PORT is installed")


def _check_extension(facts: Facts) -> Finding:
    if facts.vector_schema is None:
        remedy = (
            "pgvector is not created here; run `listener install`, or as a superuser "
            "`create extension vector`"
        )
        return Finding("extension", remedy, 3)
    return Finding("extension", f"pgvector {facts.vector_version} in schema {facts.vector_schema}")


def _check_events(facts: Facts) -> Finding:
    # Once installed, nobody needs the owner's rights to run.
    problem = events_problem(facts) or (None if facts.installed else rights_problem(facts))
    if problem:
        return Finding("iot_events", problem, 3)
    return Finding("iot_events", "a table with a fitting key")


def _check_schema(work: Connection) -> Finding:
    try:
        facts = verify(work)
        require_input(work)
        outdated = is_outdated(work, facts)
    except ListenerError as error:
        return Finding("schema", str(error), error.exit_code)
    if outdated:
        return Finding(
            "schema",
            "installed by another version, or iot_events has changed since; run `listener install`",
            warns=True,
        )
    return Finding("schema", f"installed; triggers on; {facts.embeddings_type}")


def _check_rights(settings: Settings, facts: Facts, work: Connection) -> Finding:
    """Try the loop's statements in a transaction that is rolled back."""
    queue = Queue(work, settings, None)
    kinds: dict[str, EventId] = {"uuid": UUID(int=0), "text": ""}
    nobody = kinds.get(facts.key.type if facts.key else "", 0)
    try:
        with work.transaction(force_rollback=True):
            # Of one, not of none: only where it leases an event does it need the lease's sequence.
            queue.claim(1)
            queue.read(Claim(0, [nobody]))
            queue.write(0, [Event(nobody, 0, "")], [np.zeros(DIMENSION, np.float32)], "")
            queue.fail(0, [nobody], "")
            queue.release(0, [nobody])
            queue.extend(0, [nobody])
            queue.sweep("", None, 1)
            rehearse(work)
    except ListenerError as error:
        return Finding("rights", str(error), error.exit_code)
    return Finding("rights", "may register, claim, read, write, acknowledge and sweep")


def _check_grants(conn: Connection) -> Finding:
    """As after a restore where default privileges give all on a new table."""
    with reading(conn):
        roles = ", ".join(role for (role,) in conn.execute(queries.TOO_MUCH_GRANTED).fetchall())
    if not roles:
        return Finding("grants", "nobody else may truncate event_embeddings or put triggers on it")
    return Finding(
        "grants",
        f"{roles} may truncate event_embeddings, or put a trigger on it that runs with others' "
        f"rights; revoke trigger, truncate, references on public.event_embeddings from {roles}",
        warns=True,
    )


def _check_search(conn: Connection) -> Finding:
    """The operator of `search`, and whether an index serves it. The service needs neither."""
    try:
        # No rows are asked for, so none are read; but the operator is looked up.
        nearest(conn, np.zeros(DIMENSION, np.float32), "", 0)
    except ListenerError as error:
        return Finding("search", f"`listener search` would fail: {error}", warns=True)
    with reading(conn), conn.cursor(row_factory=class_row(_VectorIndex)) as cursor:
        indexes = cursor.execute(queries.VECTOR_INDEXES).fetchall()
    for index in indexes:
        if not index.is_valid:
            problem = f"index {index.name} is invalid: its build failed"
        elif not index.serves_search:
            problem = f"index {index.name} ({index.opclass}) serves no search by cosine"
        else:
            continue
        remedy = "drop it and make the one in README, 'Reading the vectors'"
        return Finding("search", f"{problem}; {remedy}", warns=True)
    served = ", ".join(f"by index {index.name}" for index in indexes)
    return Finding("search", served or "exact: there is no vector index")


def _check_workers(conn: Connection, fingerprint: str | None) -> Finding:
    """Two workers with two models undo each other's work. `fingerprint` None: ours is unknown."""
    try:
        workers = read_workers(conn)
    except ListenerError as error:
        return Finding("workers", f"`listener status` would fail: {error}", warns=True)
    problem = other_model(workers, fingerprint) if fingerprint else None
    return Finding("workers", problem or f"{len(workers)} running", warns=problem is not None)
