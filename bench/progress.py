"""What a benchmark says while it runs, and the error that ends it."""

from __future__ import annotations

import click


class BenchError(click.ClickException):
    """A benchmark can't go on; the message says why."""


def say(text: str) -> None:
    """One line to stderr, so that stdout holds the tables alone."""
    click.echo(text, err=True)
