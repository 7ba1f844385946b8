"""One table of rows by systems: each figure with its ratio to the row's baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report import Section
from bench.systems import LISTENER

_LEFT_OUT = "-"


@dataclass(frozen=True)
class Row:
    """What was measured of each system, by its name.

    `verdict` is on the listener's own target.
    """

    title: str
    unit: str
    baseline_name: str
    baseline: float
    values: Mapping[str, float]
    more_is_better: bool = True
    decimals: int = 0
    verdict: str = ""

    def cell(self, system: str) -> str:
        """The figure and its ratio to the baseline."""
        if system not in self.values:
            return _LEFT_OUT
        value = self.values[system]
        return f"{value:.{self.decimals}f} ({value / self.baseline:.2f})"

    def ahead(self, peers: Sequence[str]) -> str:
        """Whether the listener is ahead of each peer, and if not, of which it isn't."""
        ours = self.values[LISTENER]
        behind = [
            name
            for name in peers
            if name in self.values
            and (self.values[name] >= ours if self.more_is_better else self.values[name] <= ours)
        ]
        return f"not of {', '.join(behind)}" if behind else "yes"

    def cells(self, systems: Sequence[str], peers: Sequence[str]) -> tuple[str, ...]:
        """The row as it stands in the table."""
        baseline = f"{self.baseline_name}: {self.baseline:.{self.decimals}f}"
        figures = (self.cell(name) for name in systems)
        title = f"{self.title}, {self.unit}"
        return (title, baseline, *figures, self.ahead(peers), self.verdict)


def table(
    title: str,
    method: str,
    rows: Sequence[Row],
    systems: Sequence[str],
    peers: Sequence[str],
    notes: Sequence[str],
) -> Section:
    """All rows, a column for each system."""
    header = ("", "baseline", *systems, "listener ahead of each peer", "target")
    return Section(
        title, method, header, tuple(r.cells(systems, peers) for r in rows), tuple(notes)
    )
