"""From commit to visible vector on an idle system, against the bare encode of the same texts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench import apart, systems
from bench.cluster import Cluster
from bench.models import Model
from bench.progress import BenchError, say
from bench.quiet import wait_for_quiet
from bench.report import Section, at_most
from bench.systems import OPENVINO, TORCH, System
from bench.texts import random_texts
from listener.config import Settings
from listener.database import Connection, connect

# The service commits, then this arrives: it can only make the vector seem later than it was.
ANNOUNCE_VISIBLE = """
create function public.announce_visible()
returns trigger
language plpgsql
as $$
begin
  perform pg_notify('bench_visible', (select string_agg(event_id::text, ',') from new_vectors));
  return null;
end
$$;

create trigger announce_visible
after insert on public.event_embeddings
referencing new table as new_vectors
for each statement execute function public.announce_visible();
"""

_INSERT = """
insert into public.iot_events (device_id, event_type, severity, message)
values ('pump-1', 'status', 'info', %s)
returning id
"""

# Small, so that a drift of the machine's speed meets all three measurements alike.
_BLOCK = 20
_GAP_SECONDS = (0.05, 0.4)
_PATIENCE_SECONDS = 30.0
OVERHEAD_TARGETS = (3.0, 15.0, 100.0)
# Of commit to visible with gte-small's shape, by engine; the 99th percentile second.
TARGETS = {OPENVINO: (12.0, 30.0)}


def run(cluster: Cluster, model: Model, inserts: int, engine: str) -> Section:
    """Single inserts at random gaps, in turn with bare encodes of the same texts."""
    system = systems.listener(engine)
    systems.prepare(system, model.directory)
    texts = random_texts(inserts, seed=2)
    settings = system.settings(model.directory)
    with (
        apart.timed(partial(apart.bare, model.directory)) as bare,
        apart.timed(partial(apart.own, settings)) as own,
    ):
        samples = measure(cluster, system, model, texts, [bare, own])
    return _section(model, engine, *samples)


def measure(
    cluster: Cluster,
    system: System,
    model: Model,
    texts: Sequence[str],
    encodes: Sequence[Callable[[str], float]],
) -> list[list[float]]:
    """Milliseconds of each text to be visible, then what each of `encodes` says of it."""
    say(f"latency: {system.name}")
    with cluster.database(f"latency_{system.slug}") as url:
        system.install(url)
        opened = Settings(database_url=url)
        with (
            system.worker(cluster, url, model.directory),
            connect(opened, "bench-writer") as writer,
            connect(opened, "bench-reader") as reader,
        ):
            writer.execute(ANNOUNCE_VISIBLE)
            reader.execute("listen bench_visible")
            return _measure([partial(_insert_and_wait, writer, reader), *encodes], texts)


def _measure(timed: Sequence[Callable[[str], float]], texts: Sequence[str]) -> list[list[float]]:
    """What each of `timed` says of each text, in blocks in turn, all at the same gaps."""
    samples: list[list[float]] = [[] for _ in timed]
    chance = random.Random(3)
    for start in range(0, len(texts), _BLOCK):
        wait_for_quiet()
        say(f"latency: {start} of {len(texts)} inserts")
        block = texts[start : start + _BLOCK]
        gaps = [chance.uniform(*_GAP_SECONDS) for _ in block]
        for taken, time_it in zip(samples, timed, strict=True):
            for text, gap in zip(block, gaps, strict=True):
                time.sleep(gap)
                taken.append(time_it(text))
    return samples


def _insert_and_wait(writer: Connection, reader: Connection, text: str) -> float:
    row: Any = writer.execute(_INSERT, (text,)).fetchone()
    committed = time.perf_counter()
    for note in reader.notifies(timeout=_PATIENCE_SECONDS):
        if str(row[0]) in note.payload.split(","):
            return (time.perf_counter() - committed) * 1000
    raise BenchError(f"event {row[0]} has no vector after {_PATIENCE_SECONDS:.0f} s")


def _section(
    model: Model, engine: str, visible: list[float], bare: list[float], own: list[float]
) -> Section:
    return Section(
        f"Latency, model {model.name}, engine {engine}",
        f"{len(visible)} single inserts of distinct texts of about 20 tokens at random "
        f"gaps of {_GAP_SECONDS[0] * 1000:.0f} to {_GAP_SECONDS[1] * 1000:.0f} ms on an idle "
        f"system, the service a process of its own. Commit to visible runs "
        "from the return of the autocommit insert until another session is notified of the "
        "committed vector, which is never too short. The overhead is commit to visible minus the "
        "**median** encode of one text, which has the same texts at the same gaps, in blocks of "
        f"{_BLOCK} in turn with the inserts: bare, that is `SentenceTransformer.encode([text])` on "
        "torch, and the service's own engine, each in a process that does nothing else.",
        ("milliseconds", "p50", "p99", "max"),
        (
            ("commit to visible", *_visible(visible, TARGETS.get(engine, ()))),
            ("bare `encode`", *_milliseconds(bare)),
            ("the engine's encode", *_milliseconds(own)),
            _overhead("bare `encode`", visible, bare, has_target=engine == TORCH),
            _overhead("the engine's", visible, own),
            _percentile_by_percentile("bare `encode`", visible, bare),
            _percentile_by_percentile("the engine's", visible, own),
        ),
        (
            "the first insert after the start of the service counts like any other",
            "percentile by percentile, what the machine adds to the slowest of both is left out",
        ),
    )


def _visible(visible: Sequence[float], targets: Sequence[float]) -> list[str]:
    cells = _milliseconds(visible)
    for place, target in enumerate(targets):
        cells[place] += f" ({at_most(quantiles(visible)[place], target)})"
    return cells


def _overhead(
    name: str, visible: Sequence[float], encode: Sequence[float], *, has_target: bool = True
) -> tuple[str, ...]:
    """A target is for the encode of the same engine."""
    middle = float(np.median(encode))
    overheads = [value - middle for value in quantiles(visible)]
    cells = (
        f"{value:.2f}" + (f" ({at_most(value, target)})" if has_target else "")
        for value, target in zip(overheads, OVERHEAD_TARGETS, strict=True)
    )
    return (f"**overhead** over {name} ({middle:.2f})", *cells)


def _percentile_by_percentile(
    name: str, visible: Sequence[float], encode: Sequence[float]
) -> tuple[str, ...]:
    pairs = zip(quantiles(visible), quantiles(encode), strict=True)
    return (f"minus {name}, percentile by percentile", *(f"{a - b:.2f}" for a, b in pairs))


def _milliseconds(values: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" for value in quantiles(values)]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p99 and the greatest."""
    # "higher": the p99 is a value that was measured, never one flattered by interpolation.
    p50, p99 = np.percentile(values, (50, 99), method="higher")
    return float(p50), float(p99), max(values)
