"""Threads of the harness: an error in one is an error of the whole run, not a silent end."""

from __future__ import annotations

import threading
import traceback

from tests.soak.ground import Connection


class Background(threading.Thread):
    """Calls `step` until it is stopped; what `step` raises ends the thread and is kept."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.stopped = threading.Event()
        self.failure: str | None = None
        self._conn: Connection | None = None

    def step(self) -> None:
        """One round; waits on `stopped`, never sleeps."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                self.step()
        except Exception:  # noqa: BLE001  shown in the report, which then fails
            self.failure = traceback.format_exc()

    def end(self, seconds: float = 60.0) -> None:
        """Stop, wait, and leave the database if the thread has a connection."""
        self.stopped.set()
        if self.is_alive():
            self.join(seconds)
        if self.is_alive() and self.failure is None:
            self.failure = f"{self.name} did not stop within {seconds:.0f} s"
        if self._conn is not None:
            self._conn.close()
