"""The commands put together, and their exit codes. Data to stdout, the rest to stderr."""

from __future__ import annotations

import os
import sys
import traceback
from io import StringIO, TextIOWrapper

import click

from listener import __version__, commands_install, commands_model, commands_read, commands_run
from listener.config import is_utf8
from listener.console import complain
from listener.errors import ConfigError, ListenerError

_STDERR = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Keep a sentence embedding next to every event of public.iot_events."""


for command in (
    commands_install.install_command,
    commands_install.uninstall_command,
    commands_run.run_command,
    commands_run.demo_command,
    commands_run.backfill_command,
    commands_run.retry_command,
    commands_model.model_group,
    commands_read.check_command,
    commands_read.status_command,
    commands_read.report_command,
    commands_read.show_command,
    commands_read.search_command,
):
    cli.add_command(command)


def main() -> None:
    """Entry point. Exit 0 done, 1 bug, 2 configuration or unreachable database, 3 schema."""
    # Nothing here goes to the network for a model, but `model fetch`.
    if sys.argv[1:3] != ["model", "fetch"]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # For each session of ours, whatever shell, role or database say; the driver reads no other.
    os.environ["PGDATESTYLE"] = "ISO"
    if sys.stderr is None:
        # It was closed, others maybe too; the next file or socket would take the place of one.
        while (file := os.open(os.devnull, os.O_RDWR)) < _STDERR:
            pass
        sys.stderr = os.fdopen(file, "w", errors="backslashreplace")
    # What a device wrote may not exist in the terminal's encoding.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(_run())


def _run() -> int:
    try:
        if not all(map(is_utf8, sys.argv)):
            raise ConfigError("an argument is not in UTF-8")
        cli(standalone_mode=False)
    except click.ClickException as error:
        shown = StringIO()
        error.show(shown)
        complain(shown.getvalue().rstrip())
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ListenerError as error:
        complain(f"listener: {error}")
        return error.exit_code
    except Exception:  # noqa: BLE001  the last resort: a traceback, but never with a secret in it
        complain(traceback.format_exc())
        return 1
    return 0
