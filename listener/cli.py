"""Commands and exit codes; the only module that prints. Data to stdout, the rest to stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import psycopg
from rich.console import Console

from listener import __version__, install
from listener.backfill import follow, queue_events
from listener.catalogue import Facts, read_facts
from listener.config import Settings, load_settings
from listener.database import Connection, connect
from listener.errors import ConfigError, ListenerError, SchemaError
from listener.logs import configure_logs, redact
from listener.queue import Queue
from listener.report import Report, facts_lines, require_reports_dir, write_report
from listener.search import describe, nearest
from listener.status import read_status, status_lines
from listener.wakeup import Stop

if TYPE_CHECKING:
    from listener.encoding import Encoder

_DATABASE = ("database_url",)
_MODEL = ("embedding_model", "embedding_revision")
_LOGS = ("log_format", "log_level")
_ENCODING = (*_MODEL, "batch_tokens", "cache_texts")
_SERVICE = (
    *_DATABASE,
    *_ENCODING,
    "backfill_last_n",
    "batch_events",
    "lease_seconds",
    "max_attempts",
    "retry_seconds",
    "poll_seconds",
    "sweep_seconds",
    "notify",
    *_LOGS,
)


class _Command(click.Command):
    """A command whose --help ends with the settings that it reads."""

    def __init__(self, *args: Any, settings: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the environment variables."""
        by_name = {spec.name: spec for spec in fields(Settings)}
        rows = [(name.upper(), by_name[name].metadata["help"]) for name in self.settings]
        if rows:
            with formatter.section("Settings, from the environment or .env"):
                formatter.write_dl(rows)
        super().format_epilog(ctx, formatter)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Keep a sentence embedding next to every event of public.iot_events."""


def main() -> None:
    """Entry point. Exit 0 done, 1 bug, 2 configuration or unreachable database, 3 schema."""
    # Nothing here goes to the network for a model, but `model fetch`.
    if sys.argv[1:3] != ["model", "fetch"]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(_run())


def _run() -> int:
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ListenerError as error:
        _say(f"listener: {error}")
        return error.exit_code
    except Exception:  # noqa: BLE001  the last resort: a traceback, but never with a secret in it
        _say(traceback.format_exc())
        return 1
    return 0


def _say(text: str) -> None:
    """To stderr, without secrets."""
    try:
        secrets = load_settings().secrets()
    except ConfigError:
        secrets = {os.environ.get("DATABASE_URL", ""), os.environ.get("PGPASSWORD", "")} - {""}
    click.echo(redact(text, secrets), err=True)


def _encoder(settings: Settings) -> Encoder:
    # Imports torch: seconds, which only commands that encode should take.
    from listener.embedder import load_embedder
    from listener.encoding import Encoder

    return Encoder(load_embedder(settings), settings.batch_tokens, settings.cache_texts)


def _stop_on_signals() -> Stop:
    """Set on the first SIGINT or SIGTERM; the second has its default effect."""
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


# --- install -----------------------------------------------------------------------------------


@cli.command("install", cls=_Command, settings=(*_DATABASE, "reports_dir"))
@click.option(
    "--columns", help="Columns to embed, comma-separated; default: all but keys and times."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the SQL, change nothing.")
def install_command(columns: str | None, dry_run: bool) -> None:
    """Create the queue, event_embeddings and the triggers; all or nothing, harmless twice."""
    settings = load_settings()
    wanted = [name.strip() for name in columns.split(",")] if columns else None
    with connect(settings, "listener-install") as conn:
        before = read_facts(conn)
        install.require_installable(before)
        plan = install.plan_install(conn, before, wanted)
        if dry_run:
            _print_plan(plan)
            return
        if plan.steps:
            require_reports_dir(settings)
            install.apply_plan(conn, plan)
        after = install.verify(conn)
        _tell_install(settings, before, plan, after)


def _print_plan(plan: install.Plan) -> None:
    for step in plan.steps:
        click.echo(f"-- ===== {step.file}\n{step.text.rstrip()}\n")
    _tell_steps(plan)


def _tell_steps(plan: install.Plan) -> None:
    for step in plan.steps:
        _say(f"{step.file}: {step.reason or step.text}")
    for note in plan.notes:
        _say(f"note: {note}")
    if not plan.steps:
        _say("nothing to do: everything is in place")


def _tell_install(settings: Settings, before: Facts, plan: install.Plan, after: Facts) -> None:
    _tell_steps(plan)
    if not plan.steps:
        return
    if before.input_source and before.input_source != after.input_source:
        _say("the embedded text changed; run `listener backfill --all`")
    report = Report(
        "install",
        facts_lines(before),
        [f"{step.file}: {step.reason or step.text}" for step in plan.steps] + list(plan.notes),
        facts_lines(after),
        "`listener uninstall`, with `--drop-embeddings` if the vectors shall go too.",
    )
    _say(f"installed; report in {write_report(settings, report)}")


@cli.command("uninstall", cls=_Command, settings=(*_DATABASE, "reports_dir"))
@click.option("--drop-embeddings", is_flag=True, help="Drop public.event_embeddings too.")
def uninstall_command(drop_embeddings: bool) -> None:
    """Take the triggers and the queue out again; iot_events is left as it was."""
    settings = load_settings()
    require_reports_dir(settings)
    with connect(settings, "listener-uninstall") as conn:
        before = read_facts(conn)
        plan = install.plan_uninstall(drop_embeddings)
        install.apply_plan(conn, plan)
        after = read_facts(conn)
    report = Report(
        "uninstall",
        facts_lines(before),
        [f"{step.file}: {step.reason}" for step in plan.steps],
        facts_lines(after),
        "`listener install`, then `listener backfill --all`.",
    )
    _say(f"uninstalled; report in {write_report(settings, report)}")


# --- run ---------------------------------------------------------------------------------------


@cli.command("run", cls=_Command, settings=_SERVICE)
@click.option("--once", is_flag=True, help="Embed what is due and the last N, then end.")
@click.option("--backfill-last", type=click.IntRange(0), help="Instead of BACKFILL_LAST_N.")
def run_command(once: bool, backfill_last: int | None) -> None:
    """Embed events as they are committed, until SIGTERM or Ctrl-C."""
    settings = load_settings()
    if backfill_last is not None:
        settings = replace(settings, backfill_last_n=backfill_last)
    configure_logs(settings)
    stop = _stop_on_signals()
    _serve(settings, stop, once=once)


def _serve(settings: Settings, stop: Stop, *, once: bool) -> None:
    from listener.service import Service

    with closing(_encoder(settings)) as encoder:
        Service(settings, encoder, stop).run(once=once)


@cli.command("demo", cls=_Command, settings=("demo_dir", *_LOGS))
@click.option("--events", type=click.IntRange(1), help="End after this many events.")
def demo_command(events: int | None) -> None:
    """Watch simulated device events get their vectors, on an embedded Postgres."""
    from listener.demo import run_demo

    settings = load_settings()
    run_demo(settings, events, _stop_on_signals(), Console(soft_wrap=True))


# --- backfill ----------------------------------------------------------------------------------


@cli.command("backfill", cls=_Command, settings=(*_SERVICE, "reports_dir"))
@click.option("--last", type=click.IntRange(1), help="The newest N events.")
@click.option("--all", "everything", is_flag=True, help="All events.")
@click.option("--since", type=click.DateTime(), help="Only events created at or after this time.")
@click.option("--work", is_flag=True, help="Embed here and now instead of waiting for the service.")
def backfill_command(
    last: int | None, everything: bool, since: datetime | None, work: bool
) -> None:
    """Queue events without a current embedding, newest first, and follow them being embedded."""
    if (last is None) != everything:
        raise click.UsageError("give either --last N or --all")
    # Imports the hub's client, a third of a second.
    from listener.model import locate

    settings = load_settings()
    configure_logs(settings)
    require_reports_dir(settings)
    model = locate(settings).fingerprint
    with connect(settings, "listener-backfill") as conn:
        facts = install.verify(conn)
        if since and facts.created_at is None:
            raise SchemaError("--since needs a column created_at of a timestamp type on iot_events")
        queue = Queue(conn, settings, None)
        before = queue.pending()
        queued = queue_events(queue, model, last, since and since.astimezone(), _tell_queued)
        orphans = queue.delete_orphans() if everything else 0
        steps = [
            f"looked at {queued.scanned} events, queued {queued.queued}",
            f"deleted {orphans} embeddings of events that are gone",
        ]
        stopped = _drain(conn, queue, settings, work=work)
        left = queue.pending()
    report = Report(
        "backfill",
        [f"pending: {before}"],
        [*steps, "stopped before the end" if stopped else "followed to the end"],
        [f"pending: {left}"],
        "Nothing to undo; embeddings of a text are the same however often it is embedded.",
    )
    _say(f"{left} pending; report in {write_report(settings, report)}")


def _tell_queued(scanned: int, queued: int) -> None:
    _say(f"looked at {scanned}, queued {queued}")


def _drain(conn: Connection, queue: Queue, settings: Settings, *, work: bool) -> bool:
    """Follow the drain, by the service or by ourselves. Returns whether a signal ended it."""
    stop = _stop_on_signals()
    failures: list[ListenerError] = []
    worker = threading.Thread(target=_work, args=(settings, stop, failures), name="worker")
    if work:
        worker.start()
    elif not read_status(conn, settings)["workers"] and queue.pending():
        _say("no service is running; start `listener run`, or add --work to embed here")
        return False
    follow(
        queue,
        _tell_progress,
        lambda: stop.is_set() or (work and not worker.is_alive()),
        seconds=1.0,
    )
    if work:
        worker.join()
    if failures:
        raise failures[0]
    return stop.is_set()


def _work(settings: Settings, stop: Stop, failures: list[ListenerError]) -> None:
    try:
        _serve(replace(settings, backfill_last_n=0), stop, once=True)
    except ListenerError as error:
        failures.append(error)


def _tell_progress(left: int, rate: float) -> None:
    time_left = f"{left / rate:.0f} s left" if rate else "waiting"
    _say(f"{left} pending, {rate:.0f} events/s, {time_left}")


@cli.command("retry", cls=_Command, settings=(*_DATABASE, "reports_dir"))
@click.argument("ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All parked events.")
def retry_command(ids: tuple[str, ...], everything: bool) -> None:
    """Put parked events back to the queue, their attempts forgotten."""
    if bool(ids) == everything:
        raise click.UsageError("give ids or --all")
    settings = load_settings()
    require_reports_dir(settings)
    with connect(settings, "listener-retry") as conn:
        parked = read_status(conn, settings)["parked"]
        retried = Queue(conn, settings, None).retry(None if everything else ids)
    report = Report(
        "retry",
        [f"parked: {parked}"],
        [f"back to the queue: {event_id}" for event_id in retried],
        [f"parked: {parked - len(retried)}"],
        "Nothing to undo; an event that fails again is parked again.",
    )
    _say(f"{len(retried)} back to the queue; report in {write_report(settings, report)}")
    missing = set(ids) - {str(event_id) for event_id in retried}
    if missing:
        raise ConfigError(f"not parked: {', '.join(sorted(missing))}")


# --- reading -----------------------------------------------------------------------------------


@cli.command("check", cls=_Command, settings=_SERVICE)
def check_command() -> None:
    """One line per precondition, ok or FAIL with the remedy; exit 0 only if all are ok."""
    from listener.checks import run_checks

    settings = load_settings()
    configure_logs(replace(settings, log_level="error"))
    codes = []
    for finding in run_checks(settings):
        detail = redact(finding.detail, settings.secrets())
        click.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<11} {detail}")
        if not finding.ok:
            codes.append(finding.exit_code)
    if codes:
        sys.exit(codes[0])


@cli.command("status", cls=_Command, settings=(*_DATABASE, *_MODEL, "backfill_last_n"))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status_command(as_json: bool) -> None:
    """Embedded, pending, parked, coverage of the last N, workers, last error."""
    settings = load_settings()
    with connect(settings, "listener-status") as conn:
        status = read_status(conn, settings)
    if as_json:
        click.echo(json.dumps(status, default=str))
    else:
        click.echo("\n".join(status_lines(status)))


@cli.command("show", cls=_Command, settings=(*_DATABASE, *_MODEL))
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
        tokens = embedder.count_tokens(state.input)
        limit = embedder.max_tokens
        cut = limit is not None and tokens > limit
        click.echo(f"event     {state.event_id}")
        click.echo(f"tokens    {tokens}{f', cut at {limit}' if cut else ''}")
        click.echo(f"state     {_state(state, embedder.fingerprint)}")
        click.echo(f"text\n{_indented(state.input)}")
        if state.embedding is not None and state.model is not None:
            click.echo("neighbours")
            hits = nearest(conn, state.embedding, state.model, limit=6)
            _print_hits([hit for hit in hits if hit.event_id != state.event_id][:5])


def _state(state: Any, model: str) -> str:
    if state.parked:
        return f"parked after {state.attempts} attempts: {state.error}"
    if state.pending:
        why = f", last error: {state.error}" if state.error else ""
        return f"pending, {'claimed' if state.leased else 'waiting'}{why}"
    if state.model is None:
        return "not embedded and not queued: outside the scope, see `listener backfill`"
    current = "current" if state.is_current and state.model == model else "outdated"
    return f"embedded {state.embedded_at:%Y-%m-%d %H:%M:%S}, {current}, {state.model}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _print_hits(hits: Sequence[Any]) -> None:
    for hit in hits:
        click.echo(f"  {hit.similarity:.3f}  {hit.event_id}  {' · '.join(hit.text.splitlines())}")


@cli.command("search", cls=_Command, settings=(*_DATABASE, *_ENCODING))
@click.argument("text")
@click.option("--limit", type=click.IntRange(1), default=10, show_default=True)
def search_command(text: str, limit: int) -> None:
    """The events nearest in meaning to a text."""
    settings = load_settings()
    with connect(settings, "listener-search") as conn, closing(_encoder(settings)) as encoder:
        vector = encoder.encode([text]).results[0]
        if isinstance(vector, ListenerError):
            raise vector
        hits = nearest(conn, vector, encoder.fingerprint, limit)
    if not hits:
        raise ConfigError(f"no event is embedded with {encoder.fingerprint} yet")
    _print_hits(hits)


@cli.group("model")
def model_group() -> None:
    """The model's files."""


@model_group.command("fetch", cls=_Command, settings=_MODEL)
def fetch_command() -> None:
    """Download the pinned revision into the local cache, on a machine that reaches a hub."""
    from listener.model import fetch

    click.echo(fetch(load_settings()))
