"""The metrics, each with its name and meaning. Importing this imports prometheus-client.

What happened in this process is counted here; what only the database knows is asked at a scrape,
over a connection of its own, so that without scrapes nothing is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import psycopg
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from psycopg.rows import dict_row

from listener import queries
from listener.config import Settings
from listener.counters import Histogram, counters
from listener.database import cause_of, connect, translated
from listener.errors import ListenerError
from listener.health import health
from listener.logs import log

Row = dict[str, Any]

# A reading is used for so long: two scrapers, or an impatient one, cost the database one's queries.
_GAUGES_SECONDS = 5.0
# Coverage compares the last N events with their vectors, which takes longer than the rest together.
_COVERAGE_SECONDS = 300.0
# A scrape is given up by Prometheus after 10 s; without the database it shall still come.
_PATIENCE_SECONDS = 5.0
# The server gives the statement up after so many seconds, so that none pile up behind somebody's
# lock; a server that is silent for longer is given up by us.
_GAUGES_LIMIT, _COVERAGE_LIMIT = 8, 60
_GRACE_SECONDS = 5.0


def make_registry(settings: Settings) -> CollectorRegistry:
    """All metrics of this process and of the database of the settings."""
    registry = CollectorRegistry()
    registry.register(_Process())
    registry.register(_Database(settings))
    return registry


class _Process(Collector):
    """What this process has done, and how it is."""

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "listener_ready",
            "1 while the model is loaded, the database connected and LISTEN live, and it gets on.",
            health.is_ready,
        )
        yield _histogram(
            "listener_commit_to_vector_seconds",
            "From the start of the writer's transaction to its event's vector; without backfill.",
            counters.commit_to_vector,
        )
        yield _histogram(
            "listener_batch_events", "Events in one batch of the model.", counters.batch_events
        )
        for name, meaning, value in (
            ("events_stored", "Vectors stored, those of a backfill too.", counters.events_stored),
            ("texts_encoded", "Texts that the model has encoded.", counters.texts_encoded),
            ("texts_reused", "Texts whose vector was known already.", counters.texts_reused),
            (
                "texts_truncated",
                "Encoded texts that were longer than the model's limit, and cut.",
                counters.texts_truncated,
            ),
            (
                "failed_attempts",
                "Attempts at an event that failed; it is tried again, or parked.",
                counters.failed_attempts,
            ),
            (
                "lease_expiries",
                "Claims that found events whose worker had died or lost its lease.",
                counters.lease_expiries,
            ),
            ("reconnects", "Times that the connection was lost.", counters.reconnects),
        ):
            yield CounterMetricFamily(f"listener_{name}", meaning, value)


class _Database(Collector):
    """What only the database knows: the same for all its workers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Kept for the thread that asks: by then the worker may serve no more.
        self._model: str | None = None
        self._gauges = _Reading(self._read_gauges, _GAUGES_SECONDS)
        self._coverage = _Reading(self._read_coverage, _COVERAGE_SECONDS)

    def collect(self) -> Iterator[Metric]:
        row = self._gauges.latest(_PATIENCE_SECONDS)
        yield GaugeMetricFamily(
            "listener_database_up",
            "1 if the database answered this scrape; if not, what follows is missing.",
            row is not None,
        )
        if row is None:
            return
        yield _by_lane(
            "listener_pending_events",
            "Events that wait: live are new or changed, backfill are older ones.",
            row["pending_live"],
            row["pending_backfill"],
        )
        yield _by_lane(
            "listener_oldest_pending_seconds",
            "Age of the event that has waited longest; 0 if none waits.",
            row["oldest_live_seconds"],
            row["oldest_backfill_seconds"],
        )
        yield GaugeMetricFamily(
            "listener_parked_events", "Events that failed for good.", row["parked"]
        )
        yield GaugeMetricFamily("listener_workers", "Workers whose session lives.", row["workers"])
        self._model = health.serves or self._model
        covered = self._coverage.latest(0) if health.serves else None
        if covered is not None:
            share = covered["current"] / covered["events"] if covered["events"] else 1.0
            yield GaugeMetricFamily(
                "listener_coverage_ratio",
                "Share of the last BACKFILL_LAST_N events that have a current vector.",
                share,
            )

    def _read_gauges(self) -> Row:
        return self._read(queries.GAUGES, _GAUGES_LIMIT)

    def _read_coverage(self) -> Row:
        last = self._settings.backfill_last_n
        return self._read(queries.COVERAGE, _COVERAGE_LIMIT, model=self._model, last=last)

    def _read(self, statement: str, limit: int, **parameters: Any) -> Row:
        """Raises ListenerError and psycopg.Error."""
        with (
            connect(
                self._settings, "listener-metrics", answer_seconds=limit + _GRACE_SECONDS
            ) as conn,
            translated(),
            conn.transaction(),
            conn.cursor(row_factory=dict_row) as cursor,
        ):
            cursor.execute(queries.LIMIT_STATEMENT, {"duration": f"{limit}s"})
            row = cursor.execute(statement, parameters).fetchone()
        assert row is not None  # noqa: S101  each statement has one row
        return row


class _Reading:
    """What the database said last, asked again when that is old, on a thread of its own."""

    def __init__(self, read: Callable[[], Row], seconds: float) -> None:
        """A row that is older than `seconds` is read anew."""
        self._read = read
        self._seconds = seconds
        self._row: Row | None = None
        self._next = 0.0
        self._lock = threading.Lock()
        self._thread = threading.Thread()

    def latest(self, patience_seconds: float) -> Row | None:
        """The last row; None if there is none, or if the wait for a new one takes too long."""
        with self._lock:
            if not self._thread.is_alive() and time.monotonic() >= self._next:
                # A daemon: one that waits for a dead server holds up no stop.
                self._thread = threading.Thread(target=self._refresh, name="metrics", daemon=True)
                self._thread.start()
        if patience_seconds:
            self._thread.join(patience_seconds)
            return None if self._thread.is_alive() else self._row
        return self._row

    def _refresh(self) -> None:
        try:
            self._row = self._read()
        except (ListenerError, psycopg.Error) as error:
            self._row = None
            log(logging.WARNING, "metrics_incomplete", cause=cause_of(error))
        self._next = time.monotonic() + self._seconds


def _by_lane(name: str, meaning: str, live: float, backfill: float) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=["lane"])
    family.add_metric(["live"], live)
    family.add_metric(["backfill"], backfill)
    return family


def _histogram(name: str, meaning: str, histogram: Histogram) -> Metric:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, meaning, buckets, histogram.total)
