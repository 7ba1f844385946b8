"""The table beside the peers says who is ahead, and doesn't flatter."""

from __future__ import annotations

from dataclasses import replace

from bench.rows import Row

PEERS = ["plain recipe", "pgqueuer", "procrastinate"]


def test_a_row_names_the_peers_that_the_listener_is_not_ahead_of() -> None:
    """A tie is not ahead, and a peer that could not run is not beaten."""
    row = Row("drain", "events/s", "bare", 200.0, {"listener": 100, "plain recipe": 100})

    assert row.ahead(PEERS) == "not of plain recipe"
    assert replace(row, values={"listener": 100, "pgqueuer": 99}).ahead(PEERS) == "yes"


def test_where_less_is_better_the_smaller_figure_is_ahead() -> None:
    """Latencies are read the other way round."""
    values = {"listener": 12.0, "pgqueuer": 11.0, "procrastinate": 13.0}
    row = Row("latency", "ms", "bare", 10.0, values, more_is_better=False)

    assert row.ahead(PEERS) == "not of pgqueuer"


def test_each_figure_stands_beside_its_ratio_to_the_baseline() -> None:
    """And a system that was left out has none."""
    row = Row("drain", "events/s", "bare", 200.0, {"listener": 150.0})

    cells = row.cells(["listener", "pgqueuer"], PEERS)

    assert cells == ("drain, events/s", "bare: 200", "150 (0.75)", "-", "yes", "")
