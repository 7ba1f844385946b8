"""The checker of the soak finds what it looks for: each violation, made by hand, is seen."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from psycopg.errors import LockNotAvailable

from bench.cluster import Cluster
from listener.embedded import Server
from tests.harness import is_waited_for, wait_until
from tests.soak import checker, statements
from tests.soak.checker import Checker
from tests.soak.ground import Connection, Ground, installed

_STORE = b"""
insert into public.event_embeddings (event_id, embedding, model, content_hash)
select e.id, %(vector)s::vector, %(model)s,
  sha256(convert_to(coalesce(listener.embedding_input(e.*), ''), 'UTF8'))
from public.iot_events e where strpos(e.message, 'poison') = 0
on conflict (event_id) do update set content_hash = excluded.content_hash
"""
_VECTOR = str([*np.eye(384)[0].tolist()])


@pytest.fixture
def ground(server: Server, minilm: Path, tmp_path: Path) -> Iterator[Ground]:
    """A database of its own on the server of the tests; no worker."""
    cluster = Cluster(server, tmp_path)
    ground = installed(cluster, minilm)
    yield ground
    with cluster.admin() as admin:
        admin.execute("drop database soak with (force)")


@pytest.fixture
def conn(ground: Ground) -> Iterator[Connection]:
    """Three events, embedded and acknowledged."""
    with ground.connect("test") as conn:
        conn.execute(statements.INSERT, {"events": 3})
        store(conn, ground)
        yield conn


def store(conn: Connection, ground: Ground) -> None:
    """What workers would do."""
    conn.execute(_STORE, {"vector": _VECTOR, "model": ground.fingerprint})
    conn.execute("delete from listener.change")


def look(ground: Ground, conn: Connection) -> dict[str, set[int]]:
    """What the checker finds at rest."""
    found = Checker(ground)
    found.look_at_rest(conn)
    return found.findings.events


def test_nothing_is_found_where_all_is_well(ground: Ground, conn: Connection) -> None:
    """Current vectors, a pending event, a poison one that is parked."""
    conn.execute(statements.INSERT, {"events": 1})
    conn.execute(statements.INSERT_POISON, {"events": 1})
    conn.execute("insert into listener.queue (event_id, due_at) values (5, 'infinity')")

    assert look(ground, conn) == {}


def test_a_look_holds_the_queue_before_it_takes_its_snapshot(
    ground: Ground, conn: Connection
) -> None:
    """Nobody empties it between the two."""
    with ground.connect("locker") as locker, ThreadPoolExecutor() as pool:
        with locker.transaction():
            locker.execute("lock table public.iot_events in access exclusive mode")
            found = pool.submit(look, ground, conn)
            wait_until(lambda: is_waited_for(locker, "public.iot_events"))
            for table in (b"listener.queue", b"listener.change"):
                with pytest.raises(LockNotAvailable), locker.transaction():
                    locker.execute(b"lock table " + table + b" in access exclusive mode nowait")

        assert found.result() == {}


def test_a_lost_event_is_found(ground: Ground, conn: Connection) -> None:
    """No vector, no row in the queue."""
    conn.execute("delete from public.event_embeddings where event_id = 2")

    assert look(ground, conn) == {checker.LOST: {2}}


def test_a_stale_embedding_is_found(ground: Ground, conn: Connection) -> None:
    """The text changed and nobody was told; or the vector is another model's."""
    conn.execute("update public.iot_events set message = soak.message() where id = 2")
    conn.execute("delete from listener.change")
    conn.execute("update public.event_embeddings set model = 'another' where event_id = 3")

    assert look(ground, conn) == {checker.STALE: {2, 3}}


def test_a_vector_of_a_text_gone_by_is_found(ground: Ground, conn: Connection) -> None:
    """Written after the vector of a newer text, though the newer one is written again."""
    conn.execute(
        "create temp table old as select * from public.event_embeddings where event_id = 2"
    )
    conn.execute("update public.iot_events set message = soak.message() where id = 2")
    store(conn, ground)
    conn.execute(
        "update public.event_embeddings m set content_hash = o.content_hash from old o "
        "where m.event_id = o.event_id"
    )
    store(conn, ground)

    assert look(ground, conn) == {checker.GONE_BACK: {2}}


def test_a_vector_of_a_text_never_committed_is_found(ground: Ground, conn: Connection) -> None:
    """Rolled back, or of somebody else."""
    conn.execute("update public.event_embeddings set content_hash = 'x' where event_id = 2")
    store(conn, ground)

    assert look(ground, conn) == {checker.UNKNOWN_TEXT: {2}}


def test_an_embedding_without_an_event_is_found(ground: Ground, conn: Connection) -> None:
    """Even with the foreign key's trigger out of the way."""
    with conn.transaction():
        conn.execute("set local session_replication_role = replica")
        conn.execute("delete from public.iot_events where id = 2")

    assert look(ground, conn) == {checker.ORPHAN: {2}}


def test_the_wrong_events_parked_are_found(ground: Ground, conn: Connection) -> None:
    """A good one that is, a poison one that isn't."""
    conn.execute("insert into listener.queue (event_id, due_at) values (2, 'infinity')")
    conn.execute(statements.INSERT_POISON, {"events": 1})

    assert look(ground, conn) == {checker.GOOD_PARKED: {2}, checker.UNPARKED: {4}}


def test_a_sweep_clears_what_was_changed_unseen(ground: Ground, conn: Connection) -> None:
    """Until it has run, the change is no violation."""
    conn.execute("update public.iot_events set message = soak.message() where id = 2")
    conn.execute("delete from listener.change")
    conn.execute("insert into soak.unseen values (2)")
    before = look(ground, conn)

    swept = Checker(ground).sweep(None)

    assert before == {}
    assert swept["queued"] == 1
    assert conn.execute("select event_id from listener.queue").fetchall() == [(2,)]
    assert conn.execute("select count(*) from soak.unseen").fetchone() == (0,)
