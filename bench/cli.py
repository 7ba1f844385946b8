"""The commands. Tables to stdout, progress to stderr."""

from __future__ import annotations

import os
import signal

import click

from bench import devices, drain, latency, suite, writers
from bench.cluster import running_cluster
from bench.models import MINILM, find_model
from bench.progress import say
from bench.suite import FULL, QUICK

_model = click.option(
    "--model",
    "model",
    default=MINILM,
    show_default=True,
    help="minilm (real weights), gte-shape (random weights) or a directory.",
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="All in small: does it run? Prints, writes no report.")
@click.pass_context
def cli(context: click.Context, quick: bool) -> None:
    """Run every benchmark and write _reports/bench.md; or run the one named."""
    if context.invoked_subcommand is not None:
        return
    text = suite.run_all(QUICK if quick else FULL)
    click.echo(text, nl=False)
    if not quick:
        say(f"report in {suite.write_report(text)}")


@cli.command("latency")
@click.option("--inserts", type=click.IntRange(1), default=FULL.inserts, show_default=True)
@_model
def latency_command(inserts: int, model: str) -> None:
    """Commit to visible vector on an idle system."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder)
        click.echo(latency.run(cluster, chosen, inserts).markdown())


@cli.command("drain")
@click.option("--texts", type=click.IntRange(1), default=FULL.texts, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=FULL.drain_rounds, show_default=True)
@_model
def drain_command(texts: int, rounds: int, model: str) -> None:
    """A backlog of distinct texts against one bare call of the model."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder)
        click.echo(drain.run(cluster, chosen, texts, rounds).markdown())


@cli.command("devices")
@click.option("--sample", type=click.IntRange(1), default=FULL.sample, show_default=True)
@_model
def devices_command(sample: int, model: str) -> None:
    """Real device events: reuse, and precision of the neighbours."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder)
        click.echo(devices.run(cluster, chosen, sample).markdown())


@cli.command("writers")
@click.option(
    "--clients",
    type=click.IntRange(1, 90),
    multiple=True,
    default=FULL.clients,
    show_default=True,
    help="May be given several times.",
)
@click.option("--seconds", type=click.IntRange(1), default=FULL.seconds, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=FULL.writer_rounds, show_default=True)
def writers_command(clients: tuple[int, ...], seconds: int, rounds: int) -> None:
    """What a writer pays for the trigger, the service, and for the plain recipe."""
    with running_cluster() as cluster:
        click.echo(writers.run(cluster, clients, seconds, rounds).markdown())


def main() -> None:
    """Entry point. A kill cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli()
