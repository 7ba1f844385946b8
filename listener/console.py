"""What every command shares: its --help, stderr, signals, and loading the model."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from listener import notify_systemd
from listener.config import Settings, load_settings
from listener.errors import ConfigError
from listener.logs import redact, with_priority
from listener.stop import Stop

if TYPE_CHECKING:
    from listener.encoding import Encoder

DATABASE = ("database_url",)
MODEL = ("embedding_model", "embedding_revision")
ENGINE = (*MODEL, "engine", "precision", "model_cache")
ENCODING = (*ENGINE, "cache_texts")
SERVICE = (
    *DATABASE,
    *ENCODING,
    "backfill_last_n",
    "batch_events",
    "batch_tokens",
    "lease_seconds",
    "encode_seconds",
    "max_attempts",
    "retry_seconds",
    "poll_seconds",
    "sweep_seconds",
    "notify",
    "log_format",
    "log_level",
)
# All but new line and tab.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Command(click.Command):
    """A command whose --help ends with the settings that it reads."""

    def __init__(self, *args: Any, settings: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the environment variables."""
        by_name = {spec.name: spec for spec in fields(Settings)}
        rows = [(name.upper(), by_name[name].metadata["help"]) for name in self.settings]
        with formatter.section("Settings, from the environment or .env"):
            formatter.write_dl(rows)
        super().format_epilog(ctx, formatter)


def say(text: str) -> None:
    """Print to stderr, without secrets."""
    try:
        secrets = load_settings().secrets()
    except ConfigError:
        secrets = {os.environ.get("DATABASE_URL", ""), os.environ.get("PGPASSWORD", "")} - {""}
    click.echo(printable(redact(text, secrets)), err=True)


def complain(text: str) -> None:
    """Say why the command ends; with a priority where the journal reads."""
    say(with_priority(text))


def printable(text: str) -> str:
    """The text with control characters as escapes: no terminal shall obey what a device wrote."""
    return text.translate(_CONTROLS)


def in_a_line(text: str) -> str:
    """The same in one line: what somebody else wrote shall not pass for a line of ours."""
    return printable(" ".join(text.splitlines()))


def load_encoder(settings: Settings) -> Encoder:
    """Load the model. Raises ConfigError if it is missing, damaged or of another size."""
    # Imports what an engine needs, which only commands that encode should wait for.
    from listener.embedder import load_embedder
    from listener.encoding import Encoder

    return Encoder(partial(load_embedder, settings), settings.cache_texts)


def stop_on_signals() -> Stop:
    """Set on the first SIGINT or SIGTERM; the second has its default effect."""
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        notify_systemd.stopping()
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop
