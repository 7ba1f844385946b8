"""One line of `listener check`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One precondition. `exit_code` is that of the error that the service would end with, or 0.

    It is 2 also where the service would wait, for a server that is read-only, or poll,
    because LISTEN hears nothing. With `warns` it works, but a human should look.
    """

    name: str
    detail: str
    exit_code: int = 0
    warns: bool = False

    @property
    def ok(self) -> bool:
        """Whether the service works in this respect."""
        return self.exit_code == 0

    @property
    def state(self) -> str:
        """ok, warn or FAIL."""
        if not self.ok:
            return "FAIL"
        return "warn" if self.warns else "ok"
