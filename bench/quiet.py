"""Waiting until nobody else uses the machine, because a busy core falsifies every figure.

An encode on all cores waits for its slowest thread, so one foreign process can multiply its time.
"""

from __future__ import annotations

import time
from pathlib import Path

from bench.progress import say

_COUNTERS = Path("/proc/stat")
_LOOK_SECONDS = 1.0
_QUIET_SHARE = 0.05
_PATIENCE_SECONDS = 120.0

_waits = True


def never_wait() -> None:
    """For runs that only show that the code works: their figures are rough."""
    global _waits
    _waits = False


def wait_for_quiet() -> None:
    """Return when the cores have been idle for a second; after two minutes say so and return.

    To be called while nothing of the benchmark's own is at work.
    """
    if not (_waits and _COUNTERS.exists()):
        return
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (share := _busy_share()) > _QUIET_SHARE:
        if time.monotonic() > deadline:
            say(f"warning: others keep {share:.0%} of the machine busy; the next figure is rough")
            return


def _busy_share() -> float:
    busy_before, all_before = _ticks()
    time.sleep(_LOOK_SECONDS)
    busy_after, all_after = _ticks()
    return (busy_after - busy_before) / max(all_after - all_before, 1)


def _ticks() -> tuple[int, int]:
    """(busy, all) since boot, of all cores together."""
    # user nice system idle iowait irq softirq steal; the guests' are counted in user already.
    ticks = [int(count) for count in _COUNTERS.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
