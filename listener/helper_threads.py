"""An engine's helper threads: whether they are of use for a short text alone, and where they run.

In a virtual machine a sleeping helper may be woken on the core of the thread that calls it, though
another one is idle. There it waits for milliseconds, until the kernel balances its load: as long as
the whole text takes. Torch's, on a core that is busy with something else, wait much longer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from threading import get_native_id

# In characters. Longer than that, the kernel has the time to see what is best.
_SHORT = 300
_TRIES = 5
# Of the caller's processor time: who takes so much meanwhile has helped.
_LEAST_SHARE = 0.1

_THREADS = Path("/proc/self/task")
_LIBC = ctypes.CDLL(None)


def is_short_alone(texts: Sequence[str]) -> bool:
    """Whether it is one text, done so soon that it matters where its helpers are."""
    return len(texts) == 1 and len(texts[0]) <= _SHORT


class HelperThreads:
    """Those that compute with the caller's. Elsewhere than on Linux there is none to be found."""

    def __init__(self, compute: Callable[[], object]) -> None:
        """Find who helps with `compute`: a short text, on the thread that will go on to compute."""
        # The core that they are kept off; None where they run where they like.
        self._away_from: int | None = None
        self._helpers: list[int] = []
        # The first takes longer, and the caller alone.
        compute()
        with suppress(OSError):
            before = _run_times()
            for _ in range(_TRIES):
                compute()
            taken = {tid: time - before.get(tid, 0) for tid, time in _run_times().items()}
            least = _LEAST_SHARE * taken.pop(get_native_id())
            self._helpers = [tid for tid, time in taken.items() if time > least]

    def have_idle_cores(self) -> bool:
        """Whether there are helpers, and at this moment a core for each that nothing runs on.

        False where the system does not tell.
        """
        if not self._helpers:
            return False
        most = len(os.sched_getaffinity(0)) - len(self._helpers)
        with suppress(OSError):
            if _running() <= most:
                return True
            # Who woke the caller may stand behind it on its core, with next to nothing left to do.
            os.sched_yield()
            return _running() <= most
        return False

    def place_for(self, texts: Sequence[str]) -> None:
        """A core of its own for each helper if it is a short text alone; else any they like."""
        if not self._helpers:
            return
        own = _own_core() if is_short_alone(texts) else None
        # A short text waits for this: nothing is done twice.
        if own == self._away_from:
            return
        # Not everywhere may a process do so; then it is slower, that is all.
        with suppress(OSError):
            cores = os.sched_getaffinity(0)
            places = [cores] if own is None else [{core} for core in cores - {own}]
            for tid, place in zip(self._helpers, cycle(places), strict=False):
                # The number of one that has ended may be that of another process's by now.
                if (_THREADS / str(tid)).exists():
                    os.sched_setaffinity(tid, place)
        self._away_from = own


def _run_times() -> dict[int, int]:
    """Nanoseconds on a processor, by thread of this process."""
    return {
        int(thread.name): int((thread / "schedstat").read_text().split()[0])
        for thread in _THREADS.iterdir()
    }


def _running() -> int:
    """How many threads, of whatever process, are on a core or wait for one; the caller is one."""
    # Opened by Python as a file, it takes three times as long.
    loadavg = os.open("/proc/loadavg", os.O_RDONLY)
    try:
        return int(os.read(loadavg, 100).split()[3].partition(b"/")[0])
    finally:
        os.close(loadavg)


def _own_core() -> int:
    """The core that the calling thread is on."""
    return int(_LIBC.sched_getcpu())
