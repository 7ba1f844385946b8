"""A look every second: who sits idle in a transaction, how long do events wait."""

from __future__ import annotations

from typing import Any

import psycopg

from tests.soak.background import Background
from tests.soak.ground import Connection, Ground

_EVERY_SECONDS = 1.0

_IN_TRANSACTION = b"""
select a.pid, a.state_change, a.application_name, left(a.query, 200)
from pg_stat_activity a
where a.datname = current_database()
  and a.application_name in ('listener-work', 'listener-wake')
  and a.state like 'idle in transaction%'
"""
# Of what failed, the wait is its own.
_PENDING = b"""
select
  count(*),
  coalesce(extract(epoch from clock_timestamp() - min(w.since)), 0)::float8
from listener.waiting w
left join listener.queue q on q.event_id = w.event_id
where q.error is null
"""


class Watcher(Background):
    """Keeps the worst of what it sees."""

    def __init__(self, ground: Ground) -> None:
        super().__init__("watcher")
        self._ground = ground
        self._before: set[Any] = set()
        self.in_transaction: list[str] = []
        self.pending = 0
        self.most_pending = 0
        self.longest_wait_seconds = 0.0

    def step(self) -> None:
        """One look; without a server there is nothing to see."""
        try:
            if self._conn is None or self._conn.closed:
                self._conn = self._ground.connect("soak-watcher")
            self._look(self._conn)
        except psycopg.OperationalError:
            self._before = set()
        self.stopped.wait(_EVERY_SECONDS)

    def _look(self, conn: Connection) -> None:
        seen = {row[:2]: row[2:] for row in conn.execute(_IN_TRANSACTION)}
        # The same transaction a second later, not the next of a busy connection.
        self.in_transaction += [
            f"{name} after: {query}" for key, (name, query) in seen.items() if key in self._before
        ]
        self._before = set(seen)
        row = conn.execute(_PENDING).fetchone()
        assert row is not None
        self.pending = row[0]
        self.most_pending = max(self.most_pending, row[0])
        self.longest_wait_seconds = max(self.longest_wait_seconds, row[1])
