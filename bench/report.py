"""Tables in Markdown, and whether a target was reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One benchmark's outcome: how it was measured, the table, what to know when reading it."""

    title: str
    method: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The section, headed by its title."""
        parts = [f"## {self.title}", self.method]
        if self.rows:
            parts.append(self._table())
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)

    def _table(self) -> str:
        rule = ("---", *("---:" for _ in self.header[1:]))
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows))


def at_least(value: float, target: float) -> str:
    """The target and whether the value, before any rounding, reaches it."""
    return f"≥ {target:g}: {'reached' if value >= target else 'missed'}"


def at_most(value: float, target: float) -> str:
    """The target and whether the value, before any rounding, stays within it."""
    return f"≤ {target:g}: {'reached' if value <= target else 'missed'}"
