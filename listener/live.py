"""What moves on a terminal and is plain lines anywhere else: the live status and the progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from listener.console import say, stop_on_signals

_SECONDS = 1.0


def show_live(read: Callable[[], str]) -> None:
    """Show what `read` returns again about every second, until SIGINT or SIGTERM.

    In place on a terminal; elsewhere a block of lines when it has changed.
    """
    stop = stop_on_signals()
    with _view() as show:
        while not stop.is_set():
            began = time.monotonic()
            show(read())
            # Of the database's time no more than a quarter goes into being looked at.
            stop.wait(max(_SECONDS, 3 * (time.monotonic() - began)))


@contextmanager
def _view() -> Iterator[Callable[[str], None]]:
    console = Console(highlight=False)
    shown = ""

    def print_change(text: str) -> None:
        nonlocal shown
        if text != shown:
            click.echo(f"{text}\n")
            shown = text

    # A terminal that can't move its cursor, as in an editor, is none.
    if not console.is_interactive:
        yield print_change
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda text: live.update(_styled(text), refresh=True)


def _styled(text: str) -> Text:
    styled = Text(text, no_wrap=True, overflow="ellipsis")
    styled.highlight_regex(r"(?m)^\w+( \w+)?(?=  )", "bold")
    styled.highlight_regex(r"(?m)^parked +[1-9].*|^worker +none$", "red")
    return styled


@contextmanager
def progress() -> Iterator[Callable[[int, float], None]]:
    """Tell what is left and the rate in events a second, on stderr: as a bar, or a line each."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda left, rate: say(_progress_line(left, rate))
        return
    most = 0
    with Progress(BarColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=None)

        def move(left: int, rate: float) -> None:
            nonlocal most
            most = max(most, left)
            bar.update(
                task, description=_progress_line(left, rate), total=most, completed=most - left
            )

        yield move


def _progress_line(left: int, rate: float) -> str:
    time_left = f"{left / rate:.0f} s left" if rate else "waiting"
    return f"{left} pending, {rate:.0f} events/s, {time_left}"
