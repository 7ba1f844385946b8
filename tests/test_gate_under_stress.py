"""The sleep gate in real time: inserts at random phases, and the longest wait for a vector."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from listener.database import Connection
from listener.wakeup import Wakeup
from tests.harness import Database, serving

EVENTS = 100_000
WRITERS = 4
# The time that a worker takes from a wake-up to its next sleep, roughly: so it sleeps, wakes and
# falls asleep all the time, and the inserts come at any moment of that.
_LONGEST_GAP_SECONDS = 0.005
_WORST_SECONDS = 30.0

# In the server, where a look takes no round trip: the next insert comes right after the vector,
# while the worker is about to fall asleep.
_WAIT = f"""
create function pg_temp.wait_for_vector(p_id bigint)
returns void
language plpgsql
as $$
declare
  v_deadline timestamptz := clock_timestamp() + interval '{_WORST_SECONDS} s';
begin
  while not exists (select from public.event_embeddings m where m.event_id = p_id) loop
    if clock_timestamp() > v_deadline then
      raise exception 'event % was slept through', p_id;
    end if;
    perform pg_sleep(0.0002);
  end loop;
end
$$
"""


def insert_in_rounds(database: Database, events: int) -> None:
    """Single inserts at random moments; no writer begins the next round before all have vectors.

    So the last insert of a round has nobody after it who could wake a worker that slept through it.
    """
    all_done = Barrier(WRITERS, timeout=_WORST_SECONDS + 10.0)

    def write(seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311  phases, not secrets
        with database.session() as conn:
            conn.execute(_WAIT.encode())
            for number in range(events // WRITERS):
                insert_and_wait(conn, f"{seed}/{number}", chance.uniform(0, _LONGEST_GAP_SECONDS))
                all_done.wait()

    with ThreadPoolExecutor(WRITERS) as pool:
        written = [pool.submit(write, seed) for seed in range(WRITERS)]
    assert [one.exception() for one in written] == [None] * WRITERS


def insert_and_wait(conn: Connection, message: str, gap_seconds: float) -> None:
    # In the server, so that the gaps of the writers don't wait for one another's turn.
    conn.execute("select pg_sleep(%s)", [gap_seconds])
    row = conn.execute(
        "insert into public.iot_events (device_id, event_type, severity, message) "
        "values ('d', 't', 's', %s) returning id",
        [message],
    ).fetchone()
    conn.execute("select pg_temp.wait_for_vector(%s)", row)


def test_a_thousand_inserts_at_random_phases_are_never_slept_through(database: Database) -> None:
    """With a poll of minutes, one lost wake-up fails the deadline."""
    with serving(database.with_settings(backfill_last_n=0)):
        insert_in_rounds(database, events=1000)

    assert len(database.embedded()) == 1000


@pytest.mark.soak
def test_every_insert_at_a_random_phase_is_embedded_long_before_the_poll(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost wake-up would leave the last event of a round to the poll, two minutes later."""
    wakes: list[bool] = []
    sleep = Wakeup.sleep

    def counted(wakeup: Wakeup, seconds: float) -> bool:
        wakes.append(sleep(wakeup, seconds))
        return wakes[-1]

    monkeypatch.setattr(Wakeup, "sleep", counted)
    with serving(database.with_settings(poll_seconds=120.0, backfill_last_n=0)):
        insert_in_rounds(database, EVENTS)

    (embedded, worst), *_ = database.rows(
        "select count(*), max(extract(epoch from m.embedded_at - e.created_at))::float8 "
        "from public.iot_events e join public.event_embeddings m on m.event_id = e.id"
    )
    assert embedded == EVENTS
    assert worst < _WORST_SECONDS
    # Otherwise the gate was hardly ever closed, and nothing was tried.
    assert sum(wakes) > EVENTS / 50, f"woken {sum(wakes)} times, worst {worst:.3f} s"
