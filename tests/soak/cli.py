"""The commands. Reports to a file, progress to stderr."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from pathlib import Path

import click

from bench import systems
from bench.processes import REPOSITORY
from bench.progress import say
from bench.report import Section
from tests.soak import kills, report, throughput
from tests.soak.soak import Plan, run_soak

_REPORTS = REPOSITORY / "_reports"


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=click.FloatRange(0.1), default=10, show_default=True)
@click.option("--rate", type=click.FloatRange(1), default=100, show_default=True, help="Changes/s.")
@click.option("--seed", type=int, help="Of the choices; not of their timing.")
@click.option("--out", type=click.Path(path_type=Path), default=_REPORTS / "soak.md")
@click.pass_context
def cli(context: click.Context, minutes: float, rate: float, seed: int | None, out: Path) -> None:
    """Soak under load and faults and write a report; or measure what the command names."""
    if context.invoked_subcommand is not None:
        return
    chosen = secrets.randbelow(1_000_000) if seed is None else seed
    with run_soak(Plan(minutes, chosen, rate)) as soak:
        report.write_report(report.markdown(soak), out)
        found = {name: count for name, count in report.problems(soak).items() if count}
    for name, count in found.items():
        say(f"{name}: {count}")
    say(f"{'FAILED' if found else 'passed'}; report in {out.name}")
    sys.exit(1 if found else 0)


@cli.command("kills")
@click.option("--kills", "count", type=click.IntRange(1), default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=_REPORTS / "soak_kills.md")
def kills_command(count: int, out: Path) -> None:
    """From SIGKILL of a worker with events in hand to their vectors."""
    _write("Kills", kills.run(count), out)


@cli.command("throughput")
@click.option("--seconds", type=click.FloatRange(1), default=40, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--kill-every", type=click.FloatRange(0.1), default=4, show_default=True)
@click.option("--crash-every", type=click.FloatRange(0.1), default=8, show_default=True)
@click.option(
    "--engine",
    type=click.Choice(systems.engines()),
    default=systems.engines()[-1],
    show_default=True,
)
@click.option("--out", type=click.Path(path_type=Path), default=_REPORTS / "soak_throughput.md")
def throughput_command(
    seconds: float, rounds: int, kill_every: float, crash_every: float, engine: str, out: Path
) -> None:
    """Vectors a second of a backlog, undisturbed, under kills, and under crashes of the server."""
    every = throughput.Every(kill_every, crash_every)
    _write("Throughput under faults", throughput.run(seconds, rounds, every, engine), out)


def _write(title: str, result: tuple[str, Section], out: Path) -> None:
    machine, section = result
    click.echo(section.markdown())
    report.write_report(f"# {title}\n\n{machine}\n\n{section.markdown()}\n", out)
    say(f"report in {out.name}")


def main() -> None:
    """Entry point. A kill cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli()
