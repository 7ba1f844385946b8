"""`listener install` and `uninstall`."""

from __future__ import annotations

import csv

import click

from listener import install
from listener.catalogue import Facts, read_facts
from listener.config import Settings, load_settings
from listener.console import DATABASE, Command, say
from listener.database import Connection, connect
from listener.preflight import require_installable
from listener.report import Report, facts_lines, require_reports_dir, write_report


@click.command("install", cls=Command, settings=(*DATABASE, "reports_dir"))
@click.option(
    "--columns",
    help="Columns to embed, comma-separated (with a comma in it: in double quotes); default: as "
    "before, at first all but keys and times.",
)
@click.option(
    "--print",
    "--dry-run",
    "dry_run",
    is_flag=True,
    help="The SQL to stdout, as one migration; the plan to stderr; change nothing.",
)
def install_command(columns: str | None, dry_run: bool) -> None:
    """Create the queue, event_embeddings and the triggers; all or nothing, harmless twice."""
    settings = load_settings()
    wanted = None if columns is None else _names(columns)
    if wanted and not all(wanted):
        raise click.UsageError("--columns takes names with commas between them")
    with connect(settings, "listener-install") as conn:
        before = read_facts(conn)
        require_installable(before)
        plan = install.plan_install(conn, before, wanted)
        if dry_run:
            click.echo(plan.script, nl=False)
            _tell_steps(plan)
            return
        if not plan.steps:
            install.verify(conn)
            _tell_steps(plan)
            return
        require_reports_dir(settings)
        install.apply_plan(conn, plan, say)
        _tell_install(settings, before, plan, conn)


def _names(columns: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([columns], skipinitialspace=True))]


def _tell_steps(plan: install.Plan) -> None:
    for step in plan.steps:
        say(step.line)
    for note in plan.notes:
        say(f"note: {note}")
    if not plan.steps:
        say("nothing to do: everything is in place")


def _tell_install(settings: Settings, before: Facts, plan: install.Plan, conn: Connection) -> None:
    after = read_facts(conn)
    report = Report(
        "install",
        facts_lines(before),
        [step.line for step in plan.steps] + list(plan.notes),
        facts_lines(after),
        "`listener uninstall`, with `--drop-embeddings` if the vectors shall go too."
        + _input_before(before),
    )
    # Before any message: a closed stderr must not cost it.
    path = write_report(settings, report)
    install.verify(conn)
    _tell_steps(plan)
    if before.input_source and before.input_source != after.input_source:
        say("the embedded text changed; run `listener backfill --all`")
    say(f"installed; report in {path}")


def _input_before(facts: Facts) -> str:
    """The body of embedding_input as it stood; none of one in the SQL standard's form."""
    body = (facts.input_source or "").strip()
    return f"\n\nembedding_input was:\n\n```\n{body}\n```" if body else ""


@click.command("uninstall", cls=Command, settings=(*DATABASE, "reports_dir"))
@click.option("--drop-embeddings", is_flag=True, help="Drop public.event_embeddings too.")
def uninstall_command(drop_embeddings: bool) -> None:
    """Take triggers and queue out again; with --drop-embeddings nothing is left on iot_events."""
    settings = load_settings()
    require_reports_dir(settings)
    with connect(settings, "listener-uninstall") as conn:
        before = read_facts(conn)
        has_embeddings = before.embeddings_type is not None
        if not (before.schema_owner or before.triggers or (drop_embeddings and has_embeddings)):
            say(f"nothing to do: the listener is not installed in database {before.database}")
            return
        plan = install.plan_uninstall(before, drop_embeddings)
        install.apply_plan(conn, plan, say)
        after = read_facts(conn)
    notes = [
        f"role {role} stays: something else depends on it, in another database or by a grant of "
        f"yours, or it is not yours to drop; when that is gone, `drop role {role}`"
        for role, stays in (
            ("listener_owner", after.owner_role_exists),
            ("listener_worker", after.worker_role_exists),
        )
        if stays
    ]
    report = Report(
        "uninstall",
        facts_lines(before),
        [step.line for step in plan.steps] + notes,
        facts_lines(after),
        "`listener install`, with the `--columns` of before, or your own embedding_input created "
        "again; then `listener backfill --all`." + _input_before(before),
    )
    path = write_report(settings, report)
    for note in notes:
        say(f"note: {note}")
    say(f"uninstalled; report in {path}")
