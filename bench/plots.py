"""The main tables as pictures: SVG files that the report shows beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rows import Row
from bench.systems import LISTENER
from bench.writer_runs import Sample, tps
from bench.writers import NOTHING, TRIGGER

_OURS, _THEIRS, _BASELINE = "#1f6f8b", "#b8b8b8", "#444444"
_MARKED = {NOTHING: _BASELINE, TRIGGER: "#7fb8cc", LISTENER: _OURS}


def draw_rows(rows: Sequence[Row], title: str, machine: str, path: Path) -> None:
    """A panel a row, a bar a system; the row's baseline is a line."""
    plt = _pyplot()
    height = 1.2 + sum(0.7 + 0.28 * len(row.values) for row in rows)
    shares = [len(row.values) + 2 for row in rows]
    figure, panels = plt.subplots(
        len(rows), 1, figsize=(8, height), squeeze=False, height_ratios=shares
    )
    for panel, row in zip(panels[:, 0], rows, strict=True):
        _bars(panel, row)
    _save(plt, figure, title, machine, path)


def draw_writers(samples: Sequence[Sample], machine: str, path: Path) -> None:
    """Inserts a second by number of clients, a line a variant."""
    plt = _pyplot()
    figure, panel = plt.subplots(figsize=(8, 5))
    for variant in dict.fromkeys(sample.variant for sample in samples):
        clients = sorted({s.clients for s in samples if s.variant == variant})
        rates = [tps(samples, count, variant) for count in clients]
        style = {"color": _MARKED[variant], "linewidth": 2.5} if variant in _MARKED else {}
        panel.plot(clients, rates, marker="o", label=variant, **style)
    panel.set_xscale("log", base=2)
    ticks = sorted({sample.clients for sample in samples})
    panel.set_xticks(ticks, [str(count) for count in ticks])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("clients")
    panel.set_ylabel("inserts a second")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(plt, figure, "Writers: single-row inserts, workers running", machine, path)


def _bars(panel: Any, row: Row) -> None:
    names = list(row.values)[::-1]
    values = [row.values[name] for name in names]
    colours = [_OURS if name.startswith(LISTENER) else _THEIRS for name in names]
    drawn = panel.barh(names, values, color=colours)
    labels = [f"{value:.{row.decimals}f}  ({value / row.baseline:.2f})" for value in values]
    panel.bar_label(drawn, labels, padding=3, fontsize=8)
    panel.axvline(row.baseline, color=_BASELINE, linestyle="--", linewidth=1)
    better = "more is better" if row.more_is_better else "less is better"
    panel.set_title(f"{row.title}: {row.unit}, {better}", fontsize=10, loc="left")
    baseline = f"dashed, and in brackets 1: {row.baseline_name.replace('`', '')}"
    panel.set_xlabel(baseline, fontsize=8, color=_BASELINE)
    # Room for the labels at the bars' ends.
    panel.set_xlim(0, 1.25 * max(*values, row.baseline))
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    """Imported late: only the extra `bench` has it."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same figures make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench"})
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, title: str, machine: str, path: Path) -> None:
    figure.suptitle(title, fontsize=12)
    figure.text(0.01, 0.005, machine, fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
