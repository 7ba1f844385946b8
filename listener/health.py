"""Whether the loop makes progress, and whether it serves: what /healthz and /readyz tell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from listener import notify_systemd

# Longer than any step of the loop: a statement is given up after 10 s, an attempt to connect after
# 10 s for each address.
STALLED_SECONDS = 60.0


class Health:
    """Written by the loop, read by the endpoint's threads."""

    def __init__(self) -> None:
        self._progressed: float | None = None
        # The fingerprint of the model that it serves with; None while it is not ready.
        self.serves: str | None = None

    def progressed(self) -> None:
        """The loop has come to its next step. May be called at each; only by the loop."""
        self._progressed = time.monotonic()
        notify_systemd.alive()

    @contextmanager
    def serving(self, model: str) -> Iterator[None]:
        """For this block the model is loaded, the database connected and LISTEN live."""
        self.serves = model
        try:
            yield
        finally:
            self.serves = None

    @property
    def is_stalled(self) -> bool:
        """Whether the loop hangs. Before its first step, while the model is loaded, it does not."""
        progressed = self._progressed
        return progressed is not None and time.monotonic() - progressed > STALLED_SECONDS

    @property
    def is_ready(self) -> bool:
        """Whether it serves and gets on."""
        return self.serves is not None and not self.is_stalled


health = Health()
