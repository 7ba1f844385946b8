"""A stop flag that is safe to set in a signal handler."""

from __future__ import annotations

import os
import select


class Stop:
    """Set once, for good. Safe to set from any thread, and in a signal handler.

    Not a threading.Event: a handler that sets one while its own thread begins to wait for it hangs.
    """

    def __init__(self) -> None:
        self._is_set = False
        self.read_end, self._write_end = os.pipe()

    def set(self) -> None:
        """Stop; the byte is never read, so it ends every sleep on `read_end`."""
        self._is_set = True
        os.write(self._write_end, b"!")

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._is_set

    def wait(self, seconds: float) -> None:
        """Sleep that long, or until it is set."""
        poll = select.poll()
        poll.register(self.read_end, select.POLLIN)
        poll.poll(seconds * 1000)
