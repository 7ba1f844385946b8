"""`listener model fetch` and `convert`: the model's files."""

from __future__ import annotations

import click

from listener.config import load_settings
from listener.console import MODEL, Command
from listener.model import fetch


@click.group("model")
def model_group() -> None:
    """The model's files."""


@model_group.command("fetch", cls=Command, settings=MODEL)
def fetch_command() -> None:
    """Download the pinned revision into the local cache, on a machine that reaches a hub."""
    click.echo(fetch(load_settings()))


@model_group.command("convert", cls=Command, settings=(*MODEL, "model_cache"))
def convert_command() -> None:
    """Make the model ready for OpenVINO, once; takes torch and some seconds."""
    # First: what is imported reads HF_HOME, which may be in .env.
    settings = load_settings()
    # Imports torch.
    from listener.convert import convert

    click.echo(convert(settings))
