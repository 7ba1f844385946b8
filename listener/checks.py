"""`listener check`: one line per precondition, with the remedy where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from listener.catalogue import Facts, read_facts
from listener.config import DIMENSION, Settings
from listener.database import Connection, connect
from listener.embedder import load_embedder
from listener.errors import ListenerError
from listener.install import require_installable, verify
from listener.queue import Claim, Event, EventId, Queue
from listener.wakeup import Stop, Wakeup


@dataclass(frozen=True)
class Finding:
    """One precondition. `exit_code` is that of the error that the service would end with."""

    name: str
    ok: bool
    detail: str
    exit_code: int = 0


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Every precondition in the order in which the service meets it."""
    yield Finding("settings", True, "all read and in range")
    yield _check_model(settings)
    with ExitStack() as stack:
        try:
            work = stack.enter_context(connect(settings, "listener-work-check"))
            wake = stack.enter_context(connect(settings, "listener-wake-check"))
        except ListenerError as error:
            yield Finding("connection", False, str(error), error.exit_code)
            return
        facts = read_facts(work)
        yield Finding("connection", True, f"{facts.database} as {facts.role}")
        yield _check_notify(settings, wake, work)
        yield from _check_schema(facts, work)
        yield _check_rights(settings, facts, work)


def _check_model(settings: Settings) -> Finding:
    try:
        embedder = load_embedder(settings)
    except ListenerError as error:
        return Finding("model", False, str(error), error.exit_code)
    return Finding(
        "model", True, f"{embedder.fingerprint}, {DIMENSION} numbers, engine {embedder.engine}"
    )


def _check_notify(settings: Settings, wake: Connection, work: Connection) -> Finding:
    if settings.notify == "never":
        return Finding(
            "notify", True, f"off by NOTIFY=never; polls every {settings.poll_seconds} s"
        )
    wakeup = Wakeup(wake, Stop(), settings.notify, settings.poll_seconds)
    try:
        if wakeup.listen(work):
            return Finding("notify", True, "a NOTIFY comes back")
    except ListenerError as error:
        return Finding("notify", False, str(error), error.exit_code)
    finally:
        wakeup.close()
    return Finding(
        "notify",
        False,
        "a NOTIFY doesn't come back: a transaction pooler or a standby; connect directly or to a "
        "session pooler (port 5432 on Supabase), or set NOTIFY=never to poll",
        2,
    )


def _check_schema(facts: Facts, work: Connection) -> Iterator[Finding]:
    vector = f"{facts.vector_version} in schema {facts.vector_schema}"
    if facts.vector_schema is None:
        remedy = "pgvector is not created here; run `create extension vector` or `listener install`"
        yield Finding("extension", False, remedy, 3)
    else:
        yield Finding("extension", True, f"pgvector {vector}")
    try:
        require_installable(facts)
        yield Finding("iot_events", True, "a table with a fitting key")
    except ListenerError as error:
        # Who runs need not own; what only an install needs is no failure of a running service.
        installed = facts.installed and facts.triggers_right
        yield Finding("iot_events", installed, str(error), 0 if installed else error.exit_code)
    try:
        verify(work)
        yield Finding("schema", True, f"installed; triggers on; {facts.embeddings_type}")
    except ListenerError as error:
        yield Finding("schema", False, str(error), error.exit_code)


def _check_rights(settings: Settings, facts: Facts, work: Connection) -> Finding:
    """Rehearse the loop's statements, claim for real and take it back, the others for no event."""
    queue = Queue(work, settings, None)
    kinds: dict[str, EventId] = {"uuid": UUID(int=0), "text": ""}
    nobody = kinds.get(facts.key.type if facts.key else "", 0)
    try:
        with work.transaction(force_rollback=True):
            queue.claim(1)
            queue.read(Claim(0, [nobody]))
            queue.write(0, [Event(nobody, 0, "")], [np.zeros(DIMENSION, np.float32)], "")
            queue.sweep("", None, 1)
    except ListenerError as error:
        return Finding("rights", False, str(error), error.exit_code)
    return Finding("rights", True, "may claim, read, write, acknowledge and sweep")
