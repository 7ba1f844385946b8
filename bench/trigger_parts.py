"""What the parts of the trigger cost a writer: nothing, an empty one, the gate, everything."""

from __future__ import annotations

from collections.abc import Sequence

from bench import systems
from bench.cluster import Cluster
from bench.report import Section
from bench.writer_runs import Sample, Variant, measure_variants, ratio, tps
from bench.writers import NOTHING, install_nothing
from listener.config import Settings
from listener.database import connect
from listener.wakeup import GATE_KEY

CLIENTS = (1, 32)

_EMPTY, _GATE, _EVERYTHING = "an empty trigger", "the gate alone", "everything"

_TRIGGER = """
create function public.part()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
begin
  {body}
  return null;
end
$$;

create trigger part
after insert on public.iot_events
referencing new table as new_events
for each statement execute function public.part();
"""
# Nobody holds the key, so it is open.
_GATE_BODY = f"""
  if not pg_catalog.pg_try_advisory_xact_lock_shared({GATE_KEY}) then
    perform pg_catalog.pg_notify('listener', '');
  end if;
"""


def _install_empty(url: str) -> None:
    _install(url, "")


def _install_gate(url: str) -> None:
    _install(url, _GATE_BODY)


def _install(url: str, body: str) -> None:
    with connect(Settings(database_url=url), "bench") as conn:
        conn.execute(_TRIGGER.format(body=body).encode())


def _variants() -> list[Variant]:
    return [
        Variant(NOTHING, "parts_nothing", install_nothing),
        Variant(_EMPTY, "parts_empty", _install_empty),
        Variant(_GATE, "parts_gate", _install_gate),
        Variant(_EVERYTHING, "parts_everything", systems.listener().install),
    ]


def run(cluster: Cluster, clients: Sequence[int], seconds: int, rounds: int) -> Section:
    """No worker runs, so the gate is open."""
    samples = measure_variants(cluster, _variants(), clients, seconds, rounds)
    measured = dict.fromkeys((sample.clients, sample.variant) for sample in samples)
    return Section(
        "Parts of the trigger",
        f"pgbench, prepared single-row inserts, {rounds} rounds of {seconds} s each, the variants "
        "in turn, each on a database of its own, no worker. The empty trigger is a statement "
        "trigger with a transition table and a plpgsql function that returns; the gate is that "
        "and the lock by which a writer sees whether the service sleeps; everything is the "
        "installed listener. tps is the median of the rounds, a ratio the median of theirs.",
        ("clients", "trigger", "tps", "of no trigger", "microseconds more an insert"),
        tuple(_cells(samples, count, variant) for count, variant in measured),
    )


def _cells(samples: Sequence[Sample], clients: int, variant: str) -> tuple[str, ...]:
    rate, bare = tps(samples, clients, variant), tps(samples, clients, NOTHING)
    more = (1 / rate - 1 / bare) * 1e6
    return (
        str(clients),
        variant,
        f"{rate:.0f}",
        f"{ratio(samples, clients, variant, NOTHING):.3f}",
        "" if variant == NOTHING else f"{more:.1f}",
    )
