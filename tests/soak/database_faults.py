"""What can go wrong with the database, one function each; see faults."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress

import psycopg
from psycopg import errors

from tests.soak import statements
from tests.soak.ground import MAX_CONNECTIONS, Ground
from tests.soak.scene import TERMINATE, Scene

_EXPIRE = b"""
update listener.queue q set due_at = now() - interval '1 second'
where q.event_id in (
  select h.event_id from listener.queue h
  where h.lease is not null and h.due_at > now() and h.due_at < 'infinity'
  for update skip locked
)
"""
_UPDATE_UNSEEN = b"""
with changed as (
  update public.iot_events e set message = soak.message()
  where e.id in (
    select p.id from public.iot_events p where strpos(p.message, 'poison') = 0
    order by p.id desc offset %(skip)s limit 3
    for update skip locked
  )
  returning e.id
), inserted as (
  insert into public.iot_events (device_id, event_type, severity, message)
  select 'pump-unseen', 'status', 'info', soak.message() from generate_series(1, 2)
  returning id
)
insert into soak.unseen select id from changed union all select id from inserted
on conflict do nothing
"""


def crash_server(scene: Scene) -> float:
    """Stopped as by a crash; commits that were not waited for are undone."""
    return scene.ground.restart("immediate")[1]


def restart_server(scene: Scene) -> float:
    """Stopped in order."""
    return scene.ground.restart("fast")[1]


def _lock(scene: Scene, statement: bytes, seconds: float) -> float:
    with suppress(errors.LockNotAvailable), scene.ground.connect("soak-chaos") as conn:
        conn.execute("set lock_timeout = '5s'")
        with conn.transaction():
            conn.execute(statement)
            time.sleep(seconds)
    return time.monotonic()


def lock_queue(scene: Scene) -> float:
    """No event can be claimed; writers don't notice."""
    return _lock(scene, b"lock table listener.queue in access exclusive mode", 2)


def lock_queue_for_long(scene: Scene) -> float:
    """Past the time that the service gives its statements."""
    return _lock(scene, b"lock table listener.queue in access exclusive mode", 9)


def lock_embeddings(scene: Scene) -> float:
    """No vector can be stored; writers don't notice, unless they delete."""
    return _lock(scene, b"lock table public.event_embeddings in share mode", 2)


def lock_events(scene: Scene) -> float:
    """As by a DDL statement."""
    return _lock(scene, b"lock table public.iot_events in access exclusive mode", 1)


def hold_transaction(scene: Scene) -> float:
    """A snapshot and a transaction id that hold back vacuum, and an id committed long after."""
    began = time.monotonic()
    with suppress(psycopg.OperationalError), scene.ground.connect("soak-holder") as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with conn.transaction():
            conn.execute(statements.INSERT, {"events": 2})
            time.sleep(scene.chance.uniform(10, 25))
    return began


def expire_leases(scene: Scene) -> float:
    """Somebody else may take what is in hand, several times over."""
    with scene.ground.connect("soak-chaos") as conn:
        for _ in range(5):
            conn.execute(_EXPIRE)
            time.sleep(0.01)
    return time.monotonic()


def exhaust_connections(scene: Scene) -> float:
    """Every slot, also those that a worker is made to lose."""
    with scene.ground.outages.during(), ExitStack() as stack:
        admin = stack.enter_context(scene.ground.connect("soak-chaos"))
        _fill(scene.ground, stack)
        names = ["listener-work", "listener-wake"]
        admin.execute(TERMINATE, {"names": names, "most": 2, "proxied": False})
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            _fill(scene.ground, stack)
            time.sleep(0.005)
    return time.monotonic()


def _fill(ground: Ground, stack: ExitStack) -> None:
    with suppress(psycopg.OperationalError):
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(ground.connect("soak-filler"))


def poison(scene: Scene) -> float:
    """New events and an old one whose text raises, and one that somebody repairs."""
    with scene.ground.connect("soak-chaos") as conn:
        conn.execute(statements.INSERT_POISON, {"events": scene.chance.randint(1, 2)})
        conn.execute(statements.POISON_SOME, {"skip": scene.chance.randint(0, 500)})
        conn.execute(statements.CURE_ONE, {"start": scene.chance.randint(0, 5_000)})
    return time.monotonic()


def change_unseen(scene: Scene) -> float:
    """Behind the triggers, as a restore would; the checker sweeps later."""
    with suppress(errors.LockNotAvailable), scene.ground.connect("soak-chaos") as conn:
        conn.execute("set lock_timeout = '3s'")
        with conn.transaction():
            for trigger in ("listener_inserted", "listener_updated"):
                conn.execute(f"alter table public.iot_events disable trigger {trigger}".encode())
            conn.execute(_UPDATE_UNSEEN, {"skip": scene.chance.randint(0, 500)})
            for trigger in ("listener_inserted", "listener_updated"):
                enable = f"alter table public.iot_events enable always trigger {trigger}"
                conn.execute(enable.encode())
    return time.monotonic()
