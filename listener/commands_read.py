"""`listener check`, `status`, `report`, `show` and `search`: what only reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

import click
import psycopg

from listener.config import load_settings
from listener.console import (
    DATABASE,
    ENCODING,
    ENGINE,
    MODEL,
    SERVICE,
    Command,
    in_a_line,
    load_encoder,
    printable,
    say,
)
from listener.database import connect
from listener.errors import ConfigError
from listener.logs import configure_logs, redact
from listener.report import report_path, require_reports_dir, write_page
from listener.search import EventState, Hit, describe, nearest, readable
from listener.status import read_status, status_lines

if TYPE_CHECKING:
    from listener.embedder import Embedder


@click.command("check", cls=Command, settings=(*SERVICE, "metrics_port"))
def check_command() -> None:
    """One line per precondition: ok, or warn or FAIL with the remedy; exit 0 if none is FAIL."""
    from listener.checks import run_checks

    settings = load_settings()
    configure_logs(replace(settings, log_level="error"))
    codes = []
    for finding in run_checks(settings):
        detail = redact(finding.detail, settings.secrets())
        click.echo(in_a_line(f"{finding.state:<4}  {finding.name:<11} {detail}"))
        if not finding.ok:
            codes.append(finding.exit_code)
    if codes:
        sys.exit(codes[0])


@click.command("status", cls=Command, settings=(*DATABASE, *MODEL, "precision", "backfill_last_n"))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
def status_command(as_json: bool, watch: bool) -> None:
    """Embedded, pending, parked, coverage of the last N, workers, last error."""
    settings = load_settings()
    with connect(settings, "listener-status") as conn:

        def read() -> str:
            status = read_status(conn, settings)
            if as_json:
                return json.dumps(status, default=str)
            return "\n".join(map(in_a_line, status_lines(status)))

        if not watch:
            click.echo(read())
            return
        # Imports rich, which only what moves needs.
        from listener.live import show_live

        show_live(read)


@click.command(
    "report",
    cls=Command,
    settings=(*DATABASE, *MODEL, "precision", "backfill_last_n", "reports_dir"),
)
@click.option(
    "--last",
    type=click.IntRange(1, 1_000_000),
    default=10_000,
    show_default=True,
    help="Plot the newest N events.",
)
def report_command(last: int) -> None:
    """Status, latency, throughput and settings as one HTML page in REPORTS_DIR."""
    # Imports Jinja.
    from listener.html_report import render_report

    settings = load_settings()
    require_reports_dir(settings)
    with connect(settings, "listener-report") as conn:
        say(f"reading the newest {last} events")
        page = render_report(conn, settings, last)
    path = report_path(settings, datetime.now().astimezone(), "report", "html")
    write_page(path, page)
    click.echo(path)


@click.command("show", cls=Command, settings=(*DATABASE, *ENGINE))
@click.argument("event_id", metavar="ID")
def show_command(event_id: str) -> None:
    """What would be embedded for an event, its state, and its nearest neighbours."""
    settings = load_settings()
    with connect(settings, "listener-show") as conn:
        try:
            state = describe(conn, event_id)
        except psycopg.DataError:
            raise ConfigError(f"{event_id!r} is not of the type of iot_events.id") from None
        if state is None:
            raise ConfigError(f"there is no event {event_id}")
        from listener.embedder import load_embedder

        embedder = load_embedder(settings)
        click.echo(in_a_line(f"event     {state.event_id}"))
        click.echo(f"tokens    {_tokens(state.input, embedder)}")
        click.echo(in_a_line(f"state     {_state(state, embedder.fingerprint)}"))
        click.echo(printable(f"text\n{_indented(readable(state.input))}"))
        if state.embedding is not None and state.model is not None:
            click.echo("neighbours")
            hits = nearest(conn, state.embedding, state.model, limit=6)
            _print_hits([hit for hit in hits if hit.event_id != state.event_id][:5])


def _tokens(text: str | None, embedder: Embedder) -> str:
    if text is None:
        return "unknown"
    tokens, limit = embedder.count_tokens(text), embedder.max_tokens
    return f"{tokens}, cut at {limit}" if limit is not None and tokens > limit else str(tokens)


def _state(state: EventState, model: str) -> str:
    if state.parked:
        return f"parked after {state.attempts} attempts: {state.error}"
    if state.pending:
        why = f", last error: {state.error}" if state.error else ""
        return f"pending, {'claimed' if state.leased else 'waiting'}{why}"
    if state.model is None:
        return (
            "not embedded and not queued; a sweep finds it among the last BACKFILL_LAST_N, "
            "`listener backfill` beyond"
        )
    current = "current" if state.is_current and state.model == model else "outdated"
    return f"embedded {state.embedded_at:%Y-%m-%d %H:%M:%S %Z}, {current}, {state.model}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _print_hits(hits: Sequence[Hit]) -> None:
    for hit in hits:
        click.echo(in_a_line(f"  {hit.similarity:.3f}  {hit.event_id}  {hit.line}"))


@click.command("search", cls=Command, settings=(*DATABASE, *ENCODING))
@click.argument("text")
@click.option("--limit", type=click.IntRange(1, 10_000), default=10, show_default=True)
def search_command(text: str, limit: int) -> None:
    """The events nearest in meaning to a text."""
    if not text.strip():
        raise click.UsageError("give a text to search for")
    settings = load_settings()
    with connect(settings, "listener-search") as conn, closing(load_encoder(settings)) as encoder:
        hits = nearest(conn, encoder.encode_one(text), encoder.fingerprint, limit)
    if not hits:
        raise ConfigError(f"no event is embedded with {encoder.fingerprint} yet")
    _print_hits(hits)
