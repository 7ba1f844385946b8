"""sd_notify: tell systemd how the service is. Outside systemd nothing happens.

Sources: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import logging
import os
import socket
import time

from listener.logs import log

# A systemd that is slow or starts anew must not hold up the loop.
_SEND_SECONDS = 1.0
# The watchdog is fed this many times within its time-out; each time wakes systemd, too.
_FEEDS = 5

_next_feed = 0.0


def ready() -> None:
    """READY=1: the model is loaded and LISTEN is live."""
    _send("READY=1")


def stopping() -> None:
    """STOPPING=1: the batch in hand is being finished."""
    _send("STOPPING=1\nSTATUS=finishing the batch in hand")


def status(text: str) -> None:
    """The line that `systemctl status` shows. Everybody on the machine can read it."""
    _send(f"STATUS={text}")


def is_there() -> bool:
    """Whether systemd takes messages."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def alive() -> None:
    """WATCHDOG=1: the loop made progress. Most calls do nothing, so it may be called at each step.

    Only for the loop itself: fed by a thread or a timer of its own, the watchdog would not see
    that the loop stands still.
    """
    global _next_feed
    timeout_seconds = int(os.environ.get("WATCHDOG_USEC", 0)) / 1e6
    if timeout_seconds and time.monotonic() >= _next_feed:
        _next_feed = time.monotonic() + timeout_seconds / _FEEDS
        _send("WATCHDOG=1")


def _send(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(_SEND_SECONDS)
            # A leading @ stands for the abstract namespace's zero byte.
            channel.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            channel.send(state.encode())
    except OSError as error:
        # At worst systemd starts the service again; that is no reason to end it.
        log(logging.WARNING, "systemd_does_not_listen", cause=error)
