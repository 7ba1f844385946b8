"""The sleep gate in real time: inserts at random phases, and the longest wait for a vector."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from listener.wakeup import Wakeup
from tests.harness import Database, TinyEmbedder, serving

EVENTS = 100_000
WRITERS = 4
# The time that a worker takes from a wake-up to its next sleep, roughly: so it sleeps, wakes and
# falls asleep all the time, and the inserts come at any moment of that.
_MEAN_GAP_SECONDS = 0.006
_WORST_SECONDS = 30.0


def _write(database: Database, seed: int) -> None:
    """Single inserts, each a transaction of its own, after random gaps."""
    chance = random.Random(seed)  # noqa: S311  phases, not secrets
    with database.session() as conn:
        for number in range(EVENTS // WRITERS):
            conn.execute(
                "insert into public.iot_events (device_id, event_type, severity, message) "
                "values ('d', 't', 's', %s)",
                [f"{seed}/{number}"],
            )
            # In the server, so that the gaps of the writers don't wait for one another's turn.
            gap = chance.expovariate(1 / _MEAN_GAP_SECONDS)
            conn.execute("select pg_sleep(%s)", [gap])


@pytest.mark.soak
def test_every_insert_at_a_random_phase_is_embedded_long_before_the_poll(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost wake-up would leave its event to the next insert or the poll, two minutes later."""
    wakes: list[bool] = []
    sleep = Wakeup.sleep

    def counted(wakeup: Wakeup, seconds: float) -> bool:
        wakes.append(sleep(wakeup, seconds))
        return wakes[-1]

    monkeypatch.setattr(Wakeup, "sleep", counted)
    with serving(database.with_settings(poll_seconds=120.0), TinyEmbedder()):
        with ThreadPoolExecutor(WRITERS) as pool:
            for written in [pool.submit(_write, database, seed) for seed in range(WRITERS)]:
                written.result()
        database.wait_for_rest(_WORST_SECONDS)

    (embedded, worst), *_ = database.rows(
        "select count(*), max(extract(epoch from m.embedded_at - e.created_at))::float8 "
        "from public.iot_events e join public.event_embeddings m on m.event_id = e.id"
    )
    assert embedded == EVENTS
    assert worst < _WORST_SECONDS
    # Otherwise the gate was hardly ever closed, and nothing was tried.
    assert sum(wakes) > EVENTS / 50, f"woken {sum(wakes)} times, worst {worst:.3f} s"
