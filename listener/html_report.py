"""`listener report`: how the service stands, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from listener import queries
from listener.catalogue import Facts, read_facts
from listener.config import Settings
from listener.database import Connection, reading
from listener.logs import redact
from listener.report import facts_lines
from listener.status import read_status

# Upper ends of the bars, in seconds, and how they are called.
_LATENCIES = {
    0.0: "before 0",
    0.1: "to 0.1 s",
    0.25: "to 0.25 s",
    0.5: "to 0.5 s",
    1.0: "to 1 s",
    2.5: "to 2.5 s",
    5.0: "to 5 s",
    15.0: "to 15 s",
    60.0: "to 1 min",
    600.0: "to 10 min",
    3600.0: "to 1 h",
    86400.0: "to 1 day",
}
_LONGER = "longer"

# The throughput has the first of these widths, in seconds, that gives no more bars than a phone
# can show.
_WIDTHS = {
    1: "second",
    10: "10 seconds",
    60: "minute",
    600: "10 minutes",
    3600: "hour",
    21600: "6 hours",
    86400: "day",
    604800: "week",
    2592000: "30 days",
}
_MOST_BARS = 60


@dataclass(frozen=True)
class Bar:
    """One bar of a plot; `share` is its length beside the longest, 0 to 1."""

    label: str
    events: int
    share: float


@dataclass(frozen=True)
class Latency:
    """From created_at to embedded_at; the percentiles in seconds."""

    bars: Sequence[Bar]
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Throughput:
    """Embeddings per `width`, from the first to the last of them."""

    bars: Sequence[Bar]
    width: str


def render_report(conn: Connection, settings: Settings, last: int) -> str:
    """The page, about the newest `last` events, without secrets."""
    facts = read_facts(conn)
    return _render(
        settings.secrets(),
        now=datetime.now().astimezone(),
        facts=facts,
        facts_lines=facts_lines(facts),
        status=read_status(conn, settings),
        last=last,
        latency=_read_latency(conn, facts, last),
        throughput=_read_throughput(conn, last),
        settings=_shown_settings(settings),
    )


def _render(secrets: set[str], **values: Any) -> str:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Before it is escaped: an escaped secret reads differently.
        finalize=lambda value: redact(value, secrets) if isinstance(value, str) else value,
    )
    template = Path(__file__).with_name("html_report.html").read_text("utf-8")
    return environment.from_string(template).render(values)


def _read_latency(conn: Connection, facts: Facts, last: int) -> Latency | None:
    """None without a column created_at, or without an event that has both times."""
    if facts.created_at is None:
        return None
    parameters = {"last": last, "bounds": list(_LATENCIES)}
    with reading(conn):
        row = conn.execute(queries.LATENCY, parameters).fetchone()
    if row is None or row[0] is None:
        return None
    (p50, p95, p99), counts = row
    labels = [*_LATENCIES.values(), _LONGER]
    return Latency(
        _bars(labels, [counts.get(str(n), 0) for n in range(len(labels))]), p50, p95, p99
    )


def _read_throughput(conn: Connection, last: int) -> Throughput | None:
    """None if nothing is embedded."""
    with reading(conn):
        rows = conn.execute(queries.THROUGHPUT, {"last": last}).fetchall()
    if not rows:
        return None
    first, final = rows[0][0], rows[-1][0]
    width = next(
        (width for width in _WIDTHS if final // width - first // width < _MOST_BARS),
        list(_WIDTHS)[-1],
    )
    counts = dict.fromkeys(range(first // width, final // width + 1), 0)
    for second, events in rows:
        counts[second // width] += events
    labels = [f"{datetime.fromtimestamp(n * width, UTC):%Y-%m-%d %H:%M:%S}" for n in counts]
    return Throughput(_bars(labels, list(counts.values())), _WIDTHS[width])


def _bars(labels: Sequence[str], counts: Sequence[int]) -> list[Bar]:
    most = max(counts)
    return [Bar(label, count, count / most) for label, count in zip(labels, counts, strict=True)]


def _shown_settings(settings: Settings) -> list[tuple[str, str, bool]]:
    """Name, value, and whether it is the default, of those that hold no secret."""
    return [
        (spec.name.upper(), str(value), value == spec.default)
        for spec in fields(settings)
        if spec.repr
        for value in [getattr(settings, spec.name)]
    ]
