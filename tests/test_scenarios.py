"""SCENARIOS.md names for each fault the tests that survive it; each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_NAMED = re.compile(r"`((?:soak/)?\w+\.py)(?:::(\w+))?`")


def rows() -> list[tuple[str, str]]:
    """(scenario, answer) of every line of the tables."""
    lines = (_TESTS / "SCENARIOS.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return [(row[0], row[1]) for row in cells if row[0] != "Scenario" and set(row[0]) - set("-: ")]


@pytest.mark.parametrize(("scenario", "answer"), rows(), ids=[scenario for scenario, _ in rows()])
def test_every_scenario_has_a_test_that_exists_or_a_reason(scenario: str, answer: str) -> None:
    """A test that was renamed or removed leaves no promise behind."""
    named = _NAMED.findall(answer)
    assert named or answer.startswith("No test: "), scenario
    for file, function in named:
        tree = ast.parse((_TESTS / file).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not function or function in names, f"{file} has no {function}"
