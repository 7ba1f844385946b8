"""`listener run`, `demo`, `backfill` and `retry`: what embeds or queues."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime

import click

from listener import install, notify_systemd
from listener.backfill import Queued, follow, queue_events
from listener.catalogue import Facts, read_facts
from listener.claim import EventId
from listener.config import MOST_EVENTS, Settings, load_settings
from listener.console import (
    DATABASE,
    SERVICE,
    Command,
    complain,
    load_encoder,
    printable,
    say,
    stop_on_signals,
)
from listener.database import Connection, cause_of, connect, read_clock
from listener.errors import ConfigError, EncoderLost, SchemaError, StatementTimeout
from listener.logs import configure_logs
from listener.model import locate
from listener.queue import Queue
from listener.report import Report, require_reports_dir, write_report
from listener.status import count_parked, count_pending, other_model, read_workers
from listener.stop import Stop
from listener.upkeep import delete_orphans, retry

# On a machine that it shares with the database, writers come first: where they leave no processor
# time, events wait in the queue.
_NICE = 10
# The demo has a database, a model and a log level of its own.
_OF_THE_DEMO = {"database_url", "embedding_model", "embedding_revision", "log_level"}
_DEMO = ("demo_dir", *(name for name in SERVICE if name not in _OF_THE_DEMO))
# Without backfill_last_n: its options say how much.
_BACKFILL = (*(name for name in SERVICE if name != "backfill_last_n"), "reports_dir")


@click.command("run", cls=Command, settings=(*SERVICE, "metrics_port", "metrics_host"))
@click.option("--once", is_flag=True, help="Embed what is due and the last N, then end.")
@click.option(
    "--backfill-last", type=click.IntRange(0, MOST_EVENTS), help="Instead of BACKFILL_LAST_N."
)
def run_command(once: bool, backfill_last: int | None) -> None:
    """Embed events as they are committed, until SIGTERM or Ctrl-C."""
    settings = load_settings()
    if backfill_last is not None:
        settings = replace(settings, backfill_last_n=backfill_last)
    configure_logs(settings)
    _yield_to_writers()
    stop = stop_on_signals()
    if settings.metrics_port and not once:
        # Imports what only the endpoint needs.
        from listener.endpoint import start_endpoint

        start_endpoint(settings)
    _serve(settings, stop, once=once)


def _yield_to_writers() -> None:
    """Lower the priority, unless it was given one."""
    if os.getpriority(os.PRIO_PROCESS, 0) == 0:
        # The sandbox of the units forbids it; there it is Nice= that says.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)


def _serve(
    settings: Settings,
    stop: Stop,
    *,
    once: bool,
    last_words: Callable[[Exception], None] = lambda _: None,
) -> None:
    """`last_words` is called where the process ends here and now."""
    from listener.service import Service

    notify_systemd.status("loading the model")
    with closing(load_encoder(settings)) as encoder:
        try:
            Service(settings, encoder, stop).run(once=once)
        except EncoderLost as error:
            try:
                complain(f"listener: {error}")
                last_words(error)
                logging.shutdown()
            finally:
                # Any other way out would wait for a thread that may never return.
                os._exit(error.exit_code)


@click.command("demo", cls=Command, settings=_DEMO)
@click.option("--events", type=click.IntRange(1), help="End after this many events.")
def demo_command(events: int | None) -> None:
    """Watch simulated device events get their vectors, on an embedded Postgres."""
    # Only the demo is in colour.
    from rich.console import Console

    from listener.demo import run_demo

    settings = load_settings()
    configure_logs(replace(settings, log_level="warning"))
    run_demo(settings, events, stop_on_signals(), Console(soft_wrap=True))


@click.command("backfill", cls=Command, settings=_BACKFILL)
@click.option("--last", type=click.IntRange(1), help="The newest N events.")
@click.option("--all", "everything", is_flag=True, help="All events.")
@click.option(
    "--since", type=click.DateTime(), help="Only events created at or after this local time."
)
@click.option("--work", is_flag=True, help="Embed here and now instead of waiting for the service.")
def backfill_command(
    last: int | None, everything: bool, since: datetime | None, work: bool
) -> None:
    """Queue events without a current embedding, newest first, and follow them being embedded."""
    if (last is None) != everything:
        raise click.UsageError("give either --last N or --all")
    moment = _moment(since) if since else None
    settings = load_settings()
    configure_logs(settings)
    require_reports_dir(settings)
    model = locate(settings).fingerprint
    with connect(settings, "listener-backfill") as conn:
        facts = install.verify(conn)
        if moment and facts.created_at is None:
            raise SchemaError("--since needs a column created_at of a timestamp type on iot_events")
        if problem := other_model(read_workers(conn), model):
            raise ConfigError(problem)
        before = count_pending(conn)
        stop, steps = stop_on_signals(), list[str]()

        def report_end(error: Exception) -> None:
            # Much may be queued, so there is a report; if that fails too, this error is told.
            with suppress(ConfigError):
                cause = f"ended by an error: {cause_of(error)}"
                write_report(settings, _backfill_report(before, [*steps, cause], "?"))

        try:
            _queue(queue_events(Queue(conn, settings, None), model, last, moment), stop, steps)
            if everything and not stop.is_set():
                steps.append(_delete_orphans(conn))
            steps.append(_drain(conn, settings, stop, report_end, work=work))
            left = count_pending(conn)
        except Exception as error:
            report_end(error)
            raise
    path = write_report(settings, _backfill_report(before, steps, left))
    say(f"{left} pending; report in {path}")


def _backfill_report(before: int, steps: Sequence[str], left: int | str) -> Report:
    undo = (
        "Nothing to undo. For the vectors of another model or text, set that and run a backfill "
        "again; those of events that are gone do not come back."
    )
    return Report("backfill", [f"pending: {before}"], steps, [f"pending: {left}"], undo)


def _queue(pages: Iterator[Queued], stop: Stop, steps: list[str]) -> None:
    """Page by page, until the end or a stop; the step tells how far it got, however it ends."""
    done = Queued(0, 0)
    try:
        for done in pages:
            say(f"looked at {done.scanned}, queued {done.queued}")
            if stop.is_set():
                return
    finally:
        steps.append(f"looked at {done.scanned} events, queued {done.queued}")


def _delete_orphans(conn: Connection) -> str:
    """Delete them, or let it be where the role's statements may not take so long."""
    try:
        return f"deleted {delete_orphans(conn)} embeddings of events that are gone"
    except StatementTimeout as error:
        say(f"gave up looking for embeddings of events that are gone: {error}")
        return f"deleted no embeddings of events that are gone: {error}"


def _moment(since: datetime) -> datetime:
    """What was given without a time zone is meant in this machine's."""
    try:
        return since.astimezone()
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{since} is beyond what can be told in this time zone", param_hint="--since"
        ) from None


def _drain(
    conn: Connection,
    settings: Settings,
    stop: Stop,
    last_words: Callable[[Exception], None],
    *,
    work: bool,
) -> str:
    """Follow the drain, by the service or by ourselves. Returns how that ended."""
    if stop.is_set():
        return "stopped before the end"
    if not work and not read_workers(conn) and count_pending(conn):
        say(
            "no service is seen (one behind a pooler may not be); start `listener run`, "
            "or add --work to embed here"
        )
        return "not followed: no service is seen"
    with ThreadPoolExecutor(1, "worker") as pool:
        settings = replace(settings, backfill_last_n=0)
        worker = (
            pool.submit(_serve, settings, stop, once=True, last_words=last_words) if work else None
        )
        try:
            _follow(conn, lambda: stop.is_set() or (worker is not None and worker.done()))
        except BaseException:
            stop.set()
            raise
    if worker is not None:
        worker.result()
    return "stopped before the end" if stop.is_set() else "followed to the end"


def _follow(conn: Connection, is_over: Callable[[], bool]) -> None:
    # Imports rich.
    from listener.live import progress

    with progress() as tell:
        follow(conn, read_clock(conn), tell, is_over)


@click.command("retry", cls=Command, settings=(*DATABASE, "reports_dir"))
@click.argument("ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All parked events.")
def retry_command(ids: tuple[str, ...], everything: bool) -> None:
    """Put parked events back to the queue, their attempts forgotten."""
    if bool(ids) == everything:
        raise click.UsageError("give ids or --all")
    settings = load_settings()
    require_reports_dir(settings)
    with connect(settings, "listener-retry") as conn:
        wanted = _event_ids(read_facts(conn), ids)
        before = count_parked(conn)
        retried = retry(conn, None if everything else list(wanted))
        after = count_parked(conn)
    if retried:
        report = Report(
            "retry",
            [f"parked: {before}"],
            [f"back to the queue: {printable(str(event_id))}" for event_id in retried],
            [f"parked: {after}"],
            "Nothing to undo; an event that fails again is parked again.",
        )
        say(f"report in {write_report(settings, report)}")
    say(f"{len(retried)} back to the queue")
    if missing := [text for event_id, text in wanted.items() if event_id not in retried]:
        raise ConfigError(f"not parked: {', '.join(missing)}")


def _event_ids(facts: Facts, texts: Sequence[str]) -> dict[EventId, str]:
    """The ids that are written so, and how they were written."""
    event_ids = {}
    for text in texts:
        try:
            event_ids[facts.parse_event_id(text)] = text
        except ValueError:
            raise ConfigError(f"{text!r} is not of the type of iot_events.id") from None
    return event_ids
