"""What a fault may break, and what a fault is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.proxy import Proxy
from tests.soak.ground import Ground
from tests.soak.workers import Worker, Workers

# Only the worker behind the proxy comes by TCP.
TERMINATE = b"""
select pg_terminate_backend(a.pid)
from (
  select a.pid from pg_stat_activity a
  where a.datname = current_database()
    and a.application_name = any(%(names)s)
    and (not %(proxied)s or a.client_addr is not null)
  order by random() limit %(most)s
) a
"""


@dataclass
class Scene:
    """What a fault may break."""

    ground: Ground
    workers: Workers
    proxy: Proxy
    chance: Random

    def victim(self) -> Worker:
        """A worker that serves, if there is one."""
        return self.chance.choice(self.workers.ready() or self.workers.all)

    def terminate(self, *names: str, most: int = 1, proxied: bool = False) -> None:
        """End backends of the service."""
        with self.ground.connect("soak-chaos") as conn:
            parameters = {"names": list(names), "most": most, "proxied": proxied}
            conn.execute(TERMINATE, parameters)


Strike = Callable[[Scene], float]


@dataclass(frozen=True)
class Fault:
    """`lasting`: others may strike meanwhile. `kills`: wants a peer that serves."""

    kind: str
    strike: Strike
    weight: int = 2
    lasting: bool = False
    kills: bool = False
