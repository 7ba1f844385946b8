"""The commands. Tables to stdout, progress to stderr."""

from __future__ import annotations

import os
import signal

import click

from bench import (
    devices,
    drain,
    footprint,
    health,
    latency,
    peers,
    precision,
    scale,
    suite,
    systems,
    trigger_parts,
    writers,
    writes,
)
from bench.cluster import running_cluster
from bench.models import MINILM, find_model
from bench.quiet import never_wait
from bench.suite import FULL, QUICK

_model = click.option(
    "--model",
    "model",
    default=MINILM,
    show_default=True,
    help="minilm (real weights), gte-shape (random weights) or a directory.",
)
_engine = click.option(
    "--engine",
    type=click.Choice(systems.all_engines()),
    default=systems.TORCH,
    show_default=True,
    help="One that is installed.",
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="All in small: does it run? Prints, writes no report.")
@click.option("--rough", is_flag=True, help="Don't wait for a quiet machine; --quick never does.")
@click.pass_context
def cli(context: click.Context, quick: bool, rough: bool) -> None:
    """Run every benchmark and write _reports/bench.md; or run the one named."""
    if quick or rough:
        never_wait()
    if context.invoked_subcommand is not None:
        return
    text = suite.run_all(QUICK if quick else FULL, None if quick else suite.REPORT)
    click.echo(text, nl=False)


@cli.command("peers")
@click.option("--texts", type=click.IntRange(1), default=FULL.peer_texts, show_default=True)
@click.option("--events", type=click.IntRange(1), default=FULL.peer_events, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=FULL.peer_rounds, show_default=True)
@click.option("--inserts", type=click.IntRange(1), default=FULL.peer_inserts, show_default=True)
@click.option("--seconds", type=click.IntRange(1), default=FULL.seconds, show_default=True)
@click.option(
    "--rows",
    "kinds",
    type=click.Choice(peers.KINDS),
    multiple=True,
    default=peers.KINDS,
    show_default=True,
    help="May be given several times.",
)
def peers_command(
    texts: int, events: int, rounds: int, inserts: int, seconds: int, kinds: tuple[str, ...]
) -> None:
    """The listener beside procrastinate, pgqueuer and the plain recipe."""
    rows = []
    with running_cluster() as cluster:
        if peers.DRAIN in kinds:
            rows += peers.drain_rows(cluster, texts, events, rounds)
        if peers.LATENCY in kinds:
            rows += peers.latency_rows(cluster, inserts)
        if peers.WRITERS in kinds:
            rows += writers.rows(writers.measure(cluster, peers.CLIENTS, seconds, rounds))
        click.echo(peers.section(rows, rounds).markdown())


@cli.command("latency")
@click.option("--inserts", type=click.IntRange(1), default=FULL.inserts, show_default=True)
@_model
@_engine
def latency_command(inserts: int, model: str, engine: str) -> None:
    """Commit to visible vector on an idle system."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder)
        click.echo(latency.run(cluster, chosen, inserts, engine).markdown())


@cli.command("drain")
@click.option("--texts", type=click.IntRange(1), default=FULL.texts, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=FULL.drain_rounds, show_default=True)
@_model
@_engine
def drain_command(texts: int, rounds: int, model: str, engine: str) -> None:
    """A backlog of distinct texts against one bare call of the model."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder)
        click.echo(drain.run(cluster, chosen, texts, rounds, engine).markdown())


@cli.command("footprint")
@click.option("--idle", type=click.IntRange(1), default=FULL.idle_seconds, show_default=True)
@_model
@_engine
def footprint_command(idle: int, model: str, engine: str) -> None:
    """Start, memory, and what a worker costs that has nothing to do."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder)
        click.echo(footprint.run(cluster, chosen, idle, engine).markdown())


@cli.command("precision")
@click.option("--texts", type=click.IntRange(1), default=FULL.sample, show_default=True)
@_model
def precision_command(texts: int, model: str) -> None:
    """The vectors of each engine beside those of torch in float32."""
    with running_cluster() as cluster:
        click.echo(precision.run(find_model(model, cluster.folder), texts).markdown())


@cli.command("devices")
@click.option("--sample", type=click.IntRange(1), default=FULL.sample, show_default=True)
@_model
@_engine
def devices_command(sample: int, model: str, engine: str) -> None:
    """Real device events: reuse, and precision of the neighbours."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder)
        click.echo(devices.run(cluster, chosen, sample, engine).markdown())


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
@click.option(
    "--model", help="What the workers encode with; by default what costs next to nothing."
)
@click.option("--only-plain", is_flag=True, help="Of the peers the plain recipe alone.")
def writers_command(
    clients: tuple[int, ...], seconds: int, rounds: int, model: str | None, only_plain: bool
) -> None:
    """What a writer pays for the trigger, the service, and for each peer."""
    with running_cluster() as cluster:
        chosen = find_model(model, cluster.folder) if model else None
        samples = writers.measure(cluster, clients, seconds, rounds, chosen, only_plain=only_plain)
        click.echo(writers.section(samples, seconds, chosen).markdown())


@cli.command("scale")
@click.option(
    "--sizes",
    type=click.IntRange(2_000),
    multiple=True,
    default=FULL.sizes,
    show_default=True,
    help="Events; may be given several times. 10^7 take 20 GB.",
)
def scale_command(sizes: tuple[int, ...]) -> None:
    """Start, status, sweep and claim on small and large tables."""
    click.echo(scale.run(sizes).markdown())


@cli.command("health")
@click.option("--backlog", type=click.IntRange(3_000), default=FULL.backlog, show_default=True)
@click.option(
    "--held-seconds",
    type=click.IntRange(1),
    default=FULL.held_seconds,
    show_default=True,
    help="How long a snapshot is held open.",
)
def health_command(backlog: int, held_seconds: int) -> None:
    """Claims in a long backlog, and while a snapshot is held open."""
    with running_cluster() as cluster:
        click.echo(health.backlog(cluster, backlog).markdown())
        click.echo()
        click.echo(health.held_snapshot(cluster, held_seconds).markdown())


@cli.command("writes")
@click.option(
    "--rows",
    type=click.IntRange(1),
    multiple=True,
    default=FULL.rows,
    show_default=True,
    help="In one write; may be given several times.",
)
@click.option("--filled", type=click.IntRange(0), default=FULL.filled, show_default=True)
def writes_command(rows: tuple[int, ...], filled: int) -> None:
    """The fenced write beside other ways to store the same rows."""
    with running_cluster() as cluster:
        click.echo(writes.run(cluster, rows, filled).markdown())


@cli.command("trigger")
@click.option("--seconds", type=click.IntRange(1), default=FULL.seconds, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=FULL.writer_rounds, show_default=True)
def trigger_command(seconds: int, rounds: int) -> None:
    """What each part of the trigger costs a writer."""
    with running_cluster() as cluster:
        click.echo(trigger_parts.run(cluster, trigger_parts.CLIENTS, seconds, rounds).markdown())


def main() -> None:
    """Entry point. A kill cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli()
