"""The invariants, looked at in one snapshot every few seconds while everything goes wrong."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psycopg

from listener.config import Settings
from listener.database import connect
from listener.errors import ConnectionLost
from listener.queue import Queue
from tests.soak.background import Background
from tests.soak.ground import Connection, Ground

_EVERY_SECONDS = 10.0
# A look that takes long comes less often: the checker must not be the load.
_SHARE = 0.1
_SWEPT_PAGES, _PAGE = 10, 500
_KEPT = 10

LOST, STALE, ORPHAN, DUPLICATE = "lost", "stale", "without an event", "duplicates"
GONE_BACK, UNKNOWN_TEXT, UNPARKED = "gone back", "of a text never committed", "poison not parked"
GOOD_PARKED = "good events parked"

# Before the snapshot: one from before `listener.compact` would show both tables empty.
_LOCK = b"lock table listener.queue, listener.change in access share mode"
# Nothing of it is hidden by an index: each is a scan.
_WRONG = b"""
select e.id, m.event_id is null as is_lost
from public.iot_events e
left join public.event_embeddings m on m.event_id = e.id
where not exists (select from listener.queue q where q.event_id = e.id)
  and not exists (select from listener.change c where c.event_id = e.id)
  and (
    m.event_id is null
    or m.model <> %(model)s
    or m.content_hash is distinct from case
      when strpos(e.message, 'poison') > 0 then null
      else sha256(convert_to(coalesce(listener.embedding_input(e.*), ''), 'UTF8'))
    end
  )
  and not exists (select from soak.unseen u where u.event_id = e.id)
order by e.id
"""
_ORPHANS = b"""
select m.event_id from public.event_embeddings m
where not exists (select from public.iot_events e where e.id = m.event_id)
"""
_DUPLICATES = b"""
select m.event_id from public.event_embeddings m group by m.event_id having count(*) > 1
"""
# By the order in which the event had its texts, and in which its vectors were written.
_BACKWARDS = b"""
select w.event_id, w.text_moment is null as is_unknown
from (
  select
    m.event_id,
    m.moment,
    t.moment as text_moment,
    lag(t.moment) over (partition by m.event_id order by m.moment) as before
  from soak.embedded m
  left join soak.text t on t.event_id = m.event_id and t.content_hash = m.content_hash
) w
where w.text_moment is null or w.text_moment < w.before
"""
_GOOD_PARKED = b"""
select e.id
from public.iot_events e
join listener.queue q on q.event_id = e.id
where q.due_at = 'infinity' and strpos(e.message, 'poison') = 0
"""
_UNPARKED = b"""
select e.id
from public.iot_events e
left join listener.queue q on q.event_id = e.id and q.due_at = 'infinity'
where strpos(e.message, 'poison') > 0 and q.event_id is null
"""
_SEEN = b"""
delete from soak.unseen u
where exists (select from listener.queue q where q.event_id = u.event_id)
  or exists (select from listener.change c where c.event_id = u.event_id)
  or not exists (select from public.iot_events e where e.id = u.event_id)
  or exists (
    select
    from public.iot_events e
    join public.event_embeddings m on m.event_id = e.id
    where e.id = u.event_id
      and strpos(e.message, 'poison') = 0
      and m.content_hash = sha256(convert_to(coalesce(listener.embedding_input(e.*), ''), 'UTF8'))
  )
"""
# All that is known about one event, the newest entries of the logs last.
_EVIDENCE = b"""
select
  (select to_jsonb(e) from public.iot_events e where e.id = %(id)s) as event,
  (select to_jsonb(q) from listener.queue q where q.event_id = %(id)s) as queue,
  (select to_jsonb(m) - 'embedding' from public.event_embeddings m where m.event_id = %(id)s)
    as embedding,
  (select jsonb_agg(to_jsonb(t) - 'event_id' order by t.moment)
   from soak.text t where t.event_id = %(id)s) as texts,
  (select jsonb_agg(to_jsonb(w) - 'event_id' order by w.moment)
   from soak.embedded w where w.event_id = %(id)s) as written
"""


@dataclass
class Findings:
    """Violations by kind, each event once, and what was known about the first of them."""

    events: dict[str, set[int]] = field(default_factory=dict)
    evidence: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, event_id: int, evidence: dict[str, Any]) -> None:
        with self._lock:
            known = self.events.setdefault(kind, set())
            if event_id not in known and len(known) < _KEPT:
                lines = [f"  {name}: {value}" for name, value in evidence.items()]
                self.evidence.append("\n".join([f"{kind}: event {event_id}", *lines]))
            known.add(event_id)

    def count(self, kind: str) -> int:
        """How many events were found so."""
        return len(self.events.get(kind, ()))


class Checker(Background):
    """Looks, and sweeps as `listener backfill` does."""

    def __init__(self, ground: Ground) -> None:
        super().__init__("checker")
        self._ground = ground
        self.findings = Findings()
        self.looks = 0
        self.slowest_seconds = 0.0

    def step(self) -> None:
        """One look, one sweep, and a pause."""
        began = time.monotonic()
        try:
            with self._ground.connect("soak-checker") as conn:
                self.look(conn)
            self.sweep(_SWEPT_PAGES)
        except (psycopg.OperationalError, ConnectionLost):
            # The server is away, or full.
            self.stopped.wait(1)
            return
        seconds = time.monotonic() - began
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        self.stopped.wait(max(_EVERY_SECONDS - seconds, seconds / _SHARE))

    def look(self, conn: Connection) -> None:
        """What must hold at any moment."""
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with conn.transaction():
            conn.execute(_LOCK)
            parameters = {"model": self._ground.fingerprint}
            for event_id, is_lost in conn.execute(_WRONG, parameters).fetchall():
                self._found(conn, LOST if is_lost else STALE, event_id)
            self._find(conn, ORPHAN, _ORPHANS)
            self._find(conn, DUPLICATE, _DUPLICATES)
        conn.isolation_level = None
        self.looks += 1

    def look_at_rest(self, conn: Connection) -> None:
        """What must hold once nothing moves any more, and over the whole of the logs."""
        self.look(conn)
        self._find(conn, UNPARKED, _UNPARKED)
        self._find(conn, GOOD_PARKED, _GOOD_PARKED)
        for event_id, is_unknown in conn.execute(_BACKWARDS).fetchall():
            self._found(conn, UNKNOWN_TEXT if is_unknown else GONE_BACK, event_id)

    def sweep(self, pages: int | None) -> Counter[str]:
        """The newest pages, or all; finds what was changed behind the triggers, and nothing else.

        Raises ConnectionLost.
        """
        counts, start = Counter[str](), None
        with connect(Settings(database_url=self._ground.url), "soak-sweeper") as conn:
            queue = Queue(conn, Settings(), None)
            while pages is None or counts["pages"] < pages:
                page = queue.sweep(self._ground.fingerprint, start, _PAGE)
                counts += Counter(pages=1, scanned=page.scanned, queued=page.queued)
                start = page.next_from
                if start is None:
                    break
            if counts["queued"]:
                queue.notify()
            conn.execute(_SEEN)
        return counts

    def _find(self, conn: Connection, kind: str, statement: bytes) -> None:
        for (event_id,) in conn.execute(statement).fetchall():
            self._found(conn, kind, event_id)

    def _found(self, conn: Connection, kind: str, event_id: int) -> None:
        cursor = conn.execute(_EVIDENCE, {"id": event_id})
        row = cursor.fetchone()
        assert row is not None
        assert cursor.description is not None
        names = [column.name for column in cursor.description]
        self.findings.add(kind, event_id, dict(zip(names, row, strict=True)))
