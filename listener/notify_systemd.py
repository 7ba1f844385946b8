"""sd_notify: tell systemd how the service is. Source: sd_notify(3)."""

from __future__ import annotations

import os
import socket


def ready() -> None:
    """READY=1: the model is loaded and LISTEN is live. Nothing happens outside systemd."""
    _send("READY=1")


def stopping() -> None:
    """STOPPING=1: the batch in hand is being finished."""
    _send("STOPPING=1")


def _send(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A leading @ stands for the abstract namespace's zero byte.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        channel.send(state.encode())
