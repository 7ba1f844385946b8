"""A random walk of devices, writers, two workers and an operator over one real queue.

Nobody listens here, so every NOTIFY is lost: whatever is found is found by a claim or a sweep.
"""

from __future__ import annotations

from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from psycopg.pq import TransactionStatus

from listener.queue import Queue
from listener.upkeep import delete_orphans, discard_parked, retry
from listener.worker import beat
from tests.harness import Database
from tests.state_machine import MODEL, Change, Expected, Hand, How, Plant, Step, plant, step

# Few events and few texts, so that steps meet each other.
EVENTS, MESSAGES = (1, 2, 3), (None, "", "a", "b", "c")
# The service's own: the batch that is encoded and the one that waits.
_HANDS = 2

_STATE = """
select
  coalesce(e.id, m.event_id, w.event_id), m.event_id is not null, m.content_hash, m.embedding,
  m.model, w.event_id is not null
from public.iot_events e
full join public.event_embeddings m on m.event_id = e.id
full join (
  select q.event_id from listener.queue q union select w.event_id from listener.waiting w
) w on w.event_id = coalesce(e.id, m.event_id)
"""
# Waiting for a writer's lock would hang the walk: the writer is one of its steps.
_TIME_PASSES = """
update listener.queue set due_at = queued_at
where event_id in (
  select event_id from listener.queue where due_at < 'infinity' for update skip locked
)
"""
_CHANGED = "select event_id from listener.change"
_HELD = "select event_id from listener.queue where lease = %s"
_HELD_BY_THE_DEAD = """
select q.event_id from listener.queue q
where q.worker is not null and q.due_at > now() and q.due_at < 'infinity' and not exists (
  select from pg_locks l where l.locktype = 'advisory' and l.objid = q.worker and l.granted
)
"""

changes = st.builds(
    Change,
    kind=st.sampled_from(("write", "write", "write", "touch", "delete", "replace")),
    event=st.sampled_from(EVENTS),
    message=st.sampled_from(MESSAGES),
)
numbers = st.integers(0, 3)
hows = st.sampled_from(("plain", "plain", "plain", "replica", "silent"))
steps = st.one_of(
    *step("commit", 3, change=changes, how=hows),
    *step("slow_writer", 2, change=changes, commits=st.booleans()),
    *step("claim", 3, which=numbers, events=st.sampled_from((3, 1))),
    *step("read", 3, which=numbers),
    *step("write", 4, which=numbers),
    *step("fail", 1, which=numbers),
    *step("release", 1, which=numbers),
    *step("extend", 1, which=numbers),
    *step("crash_or_start", 1, number=st.integers(0, 1)),
    *step("beat", 1, number=st.integers(0, 1)),
    *step("time_passes", 1),
    *step("retry", 1),
    *step("sweep", 1, is_full=st.booleans()),
)

T = TypeVar("T")


def pick(found: list[T], which: int) -> list[T]:
    """One of them, whatever the number; none if there is none."""
    return [found[which % len(found)]] if found else []


class QueueMachine(RuleBasedStateMachine):
    """Its invariants are those of the README, looked at after every step."""

    def __init__(self, plant: Plant) -> None:
        super().__init__()
        plant.reset()
        self.plant, self.database = plant, plant.database
        self.expected = Expected()
        self.open: Change | None = None

    # One rule, because hypothesis leaves some of many out of each walk, and one without changes or
    # without claims shows nothing.
    @rule(step=steps)
    def take(self, step: Step) -> None:
        getattr(self, step.name)(**step.arguments)

    # --- devices -------------------------------------------------------------------------------

    def commit(self, change: Change, how: How) -> None:
        """Nothing of an event that the slow writer holds: it would wait for that one."""
        if self.open is None or (how != "silent" and change.event != self.open.event):
            with self.plant.device.transaction():
                change.perform(self.plant.device, how)
            self.expected.apply(change, how)

    def slow_writer(self, change: Change, commits: bool) -> None:
        """Begins; the next time commits, or never does."""
        if self.open is None:
            change.perform(self.plant.writer, "plain")
            self.open = change
            return
        if commits:
            self.plant.writer.commit()
            self.expected.apply(self.open, "plain")
        else:
            self.plant.writer.rollback()
        self.open = None

    # --- workers -------------------------------------------------------------------------------

    def hands(self) -> list[Hand]:
        return [hand for seat in self.plant.seats for hand in seat.hands]

    def claim(self, which: int, events: int) -> None:
        seats = [s for s in self.plant.seats if s.session and len(s.hands) < _HANDS]
        for seat in pick(seats, which):
            changed = {event for (event,) in self.database.rows(_CHANGED)}
            claim = seat.queue.claim(events)
            if claim is not None and claim.event_ids:
                seat.hands.append(Hand(seat, claim))
                self.expected.lease(claim, changed)

    def read(self, which: int) -> None:
        """And encode, which touches no database. With nothing to read, claim."""
        unread = [hand for hand in self.hands() if hand.events is None]
        for hand in pick(unread, which):
            hand.events = hand.seat.queue.read(hand.claim)
            gone = set(hand.claim.event_ids) - {event.event_id for event in hand.events}
            self.expected.unlease(hand.claim, gone)
        if not unread:
            self.claim(which, 3)

    def write(self, which: int) -> None:
        """With nothing to write, read."""
        encoded = [hand for hand in self.hands() if hand.events is not None]
        for hand in pick(encoded, which):
            held = self.database.rows(_HELD, hand.claim.lease)
            stored = hand.write()
            assert stored <= {event_id for (event_id,) in held}, "stored without the lease"
            self._done(hand)
        if not encoded:
            self.read(which)

    def _done(self, hand: Hand) -> None:
        hand.seat.hands.remove(hand)
        self.expected.unlease(hand.claim, hand.claim.event_ids)

    def fail(self, which: int) -> None:
        for hand in pick(self.hands(), which):
            hand.seat.queue.fail(hand.claim.lease, hand.claim.event_ids, "refused")
            self._done(hand)

    def release(self, which: int) -> None:
        for hand in pick(self.hands(), which):
            hand.seat.queue.release(hand.claim.lease, hand.claim.event_ids)
            self._done(hand)

    def extend(self, which: int) -> None:
        for hand in pick(self.hands(), which):
            hand.seat.queue.extend(hand.claim.lease, hand.claim.event_ids)

    def crash_or_start(self, number: int) -> None:
        seat = self.plant.seats[number]
        if seat.session is None:
            seat.start()
            return
        for hand in seat.hands:
            self.expected.unlease(hand.claim, hand.claim.event_ids)
        seat.crash()

    def beat(self, number: int) -> None:
        """A dead peer's events are released."""
        seat = self.plant.seats[number]
        if seat.session is not None:
            beat(seat.conn, seat.worker.number)
            assert not self.database.rows(_HELD_BY_THE_DEAD), "held by the dead"

    # --- operators and time --------------------------------------------------------------------

    def time_passes(self) -> None:
        """Leases end under those who still work on them, and backoffs end."""
        self.database.rows(_TIME_PASSES)
        self.expected.leased.clear()

    def retry(self) -> None:
        retry(self.plant.device, None)

    def sweep(self, is_full: bool) -> None:
        """A page for each event, so that no two are due at the same time."""
        queue = Queue(self.plant.device, self.database.settings, None)
        page = queue.sweep(MODEL, None, 1)
        while page.next_from is not None:
            page = queue.sweep(MODEL, page.next_from, 1)
        self.expected.unseen.clear()
        if is_full:
            discard_parked(self.plant.device)
            delete_orphans(self.plant.device)
            self.expected.orphans.clear()

    # --- what must hold ------------------------------------------------------------------------

    @invariant()
    def every_event_is_embedded_or_queued(self) -> None:
        self.is_sound = False
        rows = self.database.rows(_STATE)
        stored = {
            event: (bytes(digest), vector.to_numpy())
            for event, is_embedded, digest, vector, _, _ in rows
            if is_embedded
        }
        assert {model for *_, model, _ in rows} <= {MODEL, None}
        self.expected.check(stored, queued={row[0] for row in rows if row[-1]})
        self.is_sound = True

    @invariant()
    def no_worker_is_idle_in_transaction(self) -> None:
        statuses = {s.conn.info.transaction_status for s in self.plant.seats if s.session}
        assert statuses <= {TransactionStatus.IDLE}

    def teardown(self) -> None:
        """At rest nothing waits but what is parked; a zombie that wakes up then changes nothing."""
        self.plant.writer.rollback()
        self.open = None
        if not self.is_sound:
            return
        self.time_passes()
        self._drain()
        self.sweep(is_full=True)
        self._drain()
        while self.hands():
            self.write(0)
        assert not self.expected.unseen
        self.every_event_is_embedded_or_queued()
        assert self.database.is_at_rest(), "not at rest"
        left = self.database.rows("select event_id from listener.queue")
        assert {event for (event,) in left} <= self.expected.alive.keys()

    def _drain(self) -> None:
        """By both workers in turn, until neither finds anything."""
        for seat in self.plant.seats:
            if seat.session is None:
                seat.start()
        idle = 0
        while idle < len(self.plant.seats):
            for seat in self.plant.seats:
                claim = seat.queue.claim(2)
                idle = 0 if claim else idle + 1
                if claim is not None:
                    Hand(seat, claim, seat.queue.read(claim)).write()


def walk(plant: Plant, walks: int, **options: Any) -> None:
    """The same walks in every run. Raises AssertionError where a step breaks a promise."""

    class Machine(QueueMachine):
        def __init__(self) -> None:
            super().__init__(plant)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=walks,
            stateful_step_count=40,
            report_multiple_bugs=False,
            **options,
        ),
    )


def test_no_interleaving_of_two_workers_loses_an_event_or_brings_back_an_older_text(
    database: Database,
) -> None:
    """What the README promises holds after every step, and at rest nothing waits."""
    with plant(database) as made:
        walk(made, walks=250)
