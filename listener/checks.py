"""`listener check`: one line per precondition, with the remedy where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from uuid import UUID

import numpy as np

from listener.blame import require_input
from listener.catalogue import Facts, read_facts
from listener.checks_link import check_clock, check_notify, check_server, check_tls, no_connection
from listener.checks_reading import check_search, check_workers
from listener.claim import Claim, Event, EventId
from listener.config import DIMENSION, Settings
from listener.database import Connection, connect
from listener.embedder import load_embedder
from listener.endpoint import require_metrics
from listener.errors import ListenerError, SchemaError
from listener.finding import Finding
from listener.install import verify
from listener.preflight import events_problem, rights_problem
from listener.queue import Queue
from listener.worker import Worker


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Every precondition in the order in which the service meets it."""
    yield Finding("settings", True, "all read and in range")
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
            yield Finding("rights", False, str(error), error.exit_code)
            return
        yield Finding("connection", True, f"{facts.database} as {facts.role}")
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
    yield check_search(work)
    yield check_workers(work, fingerprint)


def _check_model(settings: Settings) -> tuple[str | None, Finding]:
    try:
        embedder = load_embedder(settings)
    except ListenerError as error:
        return None, Finding("model", False, str(error), error.exit_code)
    detail = f"{embedder.fingerprint}, {DIMENSION} numbers, engine {embedder.engine}"
    return embedder.fingerprint, Finding("model", True, detail)


def _check_metrics() -> Finding:
    # Not whether the port is free: a service that runs has it.
    try:
        require_metrics()
    except ListenerError as error:
        return Finding("metrics", False, str(error), error.exit_code)
    return Finding("metrics", True, "the package for METRICS_PORT is installed")


def _check_extension(facts: Facts) -> Finding:
    if facts.vector_schema is None:
        remedy = "pgvector is not created here; run `create extension vector` or `listener install`"
        return Finding("extension", False, remedy, 3)
    return Finding(
        "extension", True, f"pgvector {facts.vector_version} in schema {facts.vector_schema}"
    )


def _check_events(facts: Facts) -> Finding:
    # Once installed, nobody needs the owner's rights to run.
    problem = events_problem(facts) or (None if facts.installed else rights_problem(facts))
    if problem:
        return Finding("iot_events", False, problem, 3)
    return Finding("iot_events", True, "a table with a fitting key")


def _check_schema(work: Connection) -> Finding:
    try:
        facts = verify(work)
        require_input(work)
    except ListenerError as error:
        return Finding("schema", False, str(error), error.exit_code)
    return Finding("schema", True, f"installed; triggers on; {facts.embeddings_type}")


def _check_rights(settings: Settings, facts: Facts, work: Connection) -> Finding:
    """Try the loop's statements in a transaction that is rolled back; but the claim on no event."""
    queue = Queue(work, settings, None)
    kinds: dict[str, EventId] = {"uuid": UUID(int=0), "text": ""}
    nobody = kinds.get(facts.key.type if facts.key else "", 0)
    try:
        with work.transaction(force_rollback=True):
            queue.claim(1)
            queue.read(Claim(0, [nobody]))
            queue.write(0, [Event(nobody, 0, "")], [np.zeros(DIMENSION, np.float32)], "")
            queue.fail(0, [nobody], "")
            queue.release(0, [nobody])
            queue.extend(0, [nobody])
            queue.sweep("", None, 1)
            # Last, because a beat may hold what writers need until the end of the transaction.
            with Worker.registered(work, "") as worker:
                worker.unlock()
    except ListenerError as error:
        return Finding("rights", False, str(error), error.exit_code)
    return Finding("rights", True, "may claim, read, write, acknowledge and sweep")
