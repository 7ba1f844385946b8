"""What can go wrong with processes, sessions and the network, one function each.

Each returns the moment, in time.monotonic(), from which recovery counts.
"""

from __future__ import annotations

import signal
import time

from tests.soak.ground import MAX_CONNECTIONS
from tests.soak.scene import Scene

LEASE_SECONDS = 10.0
_LONG_MESSAGE, _LONG_MESSAGE_SECONDS = 3_000, 1.0

_CANCEL = b"""
select pg_cancel_backend(a.pid) from pg_stat_activity a
where a.datname = current_database() and a.application_name like 'listener-w%'
"""


def nothing(_: Scene) -> float:
    """The same measurement where nothing happens."""
    return time.monotonic()


def kill_one(scene: Scene) -> float:
    """SIGKILL."""
    scene.workers.send(scene.victim(), signal.SIGKILL)
    return time.monotonic()


def kill_all(scene: Scene) -> float:
    """Nobody is left; the events wait for the first that is started again."""
    for worker in scene.workers.all:
        scene.workers.send(worker, signal.SIGKILL)
    return time.monotonic()


def end_one(scene: Scene) -> float:
    """SIGTERM: an orderly leave."""
    ready = scene.workers.ready()
    if ready:
        # While it still loads, a SIGTERM kills: there is nothing yet to leave in order.
        scene.workers.send(scene.chance.choice(ready), signal.SIGTERM)
    return time.monotonic()


def stop_past_lease(scene: Scene) -> float:
    """A zombie that wakes when its events are somebody else's."""
    worker, began = scene.victim(), time.monotonic()
    process = worker.process
    process.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS + scene.chance.uniform(1, 3))
    process.send_signal(signal.SIGCONT)
    return began


def terminate_wake(scene: Scene) -> float:
    """The connection that listens, of one worker."""
    scene.terminate("listener-wake")
    return time.monotonic()


def terminate_work(scene: Scene) -> float:
    """The connection that claims and writes, of one worker."""
    scene.terminate("listener-work")
    return time.monotonic()


def terminate_pair(scene: Scene) -> float:
    """Both connections of one worker."""
    scene.terminate("listener-work", "listener-wake", most=2, proxied=True)
    return time.monotonic()


def terminate_every(scene: Scene) -> float:
    """All connections of all workers."""
    scene.terminate("listener-work", "listener-wake", most=MAX_CONNECTIONS)
    return time.monotonic()


def terminate_writer(scene: Scene) -> float:
    """An application loses its connection, perhaps within a transaction."""
    with scene.ground.outages.during():
        scene.terminate("soak-writer")
    return time.monotonic()


def cancel_statements(scene: Scene) -> float:
    """Whatever the workers execute now is cancelled."""
    with scene.ground.connect("soak-chaos") as conn:
        conn.execute(_CANCEL)
    return time.monotonic()


def reset_proxy(scene: Scene) -> float:
    """RST on all connections of one worker."""
    scene.proxy.reset()
    return time.monotonic()


def black_hole(scene: Scene) -> float:
    """Nothing passes and nobody is told, on all connections of one worker."""
    began = time.monotonic()
    scene.proxy.black_hole()
    time.sleep(scene.chance.uniform(2, 12))
    scene.proxy.heal()
    return began


def latency(scene: Scene) -> float:
    """Each message of one worker takes longer."""
    began = time.monotonic()
    scene.proxy.delay_seconds = 0.2
    time.sleep(scene.chance.uniform(3, 8))
    scene.proxy.delay_seconds = 0.0
    return began


def lose_a_reply(scene: Scene) -> float:
    """To the next message that is as long as one with vectors; if none comes, to any."""
    began, cut = time.monotonic(), list[float]()

    def is_chosen(data: bytes) -> bool:
        is_late = time.monotonic() - began > _LONG_MESSAGE_SECONDS
        if cut or not (is_late or len(data) > _LONG_MESSAGE):
            return False
        cut.append(time.monotonic())
        return True

    scene.proxy.swallow_reply_to = is_chosen
    while not cut and time.monotonic() - began < 3 * _LONG_MESSAGE_SECONDS:
        time.sleep(0.02)
    scene.proxy.swallow_reply_to = None
    return cut[0] if cut else time.monotonic()
