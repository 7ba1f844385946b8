"""Three workers under load, and every few seconds one of them is killed."""

from __future__ import annotations

import pytest

from tests.soak import faults
from tests.soak.report import problems
from tests.soak.scene import Fault
from tests.soak.soak import Plan, run_soak

_MINUTES = 2.0


@pytest.mark.soak
def test_one_of_three_workers_killed_again_and_again_costs_nothing() -> None:
    """SIGKILL every 1 to 3 seconds, whether the others are there again or not."""
    kill = Fault("SIGKILL of one worker", faults.kill_one)

    with run_soak(Plan(_MINUTES, seed=1, every=(1.0, 3.0), faults=(kill,))) as soak:
        found = {name: count for name, count in problems(soak).items() if count}

    assert found == {}
    assert soak.chaos.counts.total() > 20 * _MINUTES
