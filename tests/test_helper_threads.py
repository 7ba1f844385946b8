"""Helper threads: who helps is found out, and a short text alone has them off the caller's core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import get_native_id

import pytest

from listener import helper_threads
from listener.config import Settings
from listener.embedder import Embedder, load_embedder
from listener.helper_threads import HelperThreads
from tests.harness import empty_folder, environment, wait_until

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.cpu_count() == 1, reason="only Linux says who runs where"
)

SHORT, LONG = "pump hot", "pump hot " * 40


def burn() -> None:
    """A few milliseconds of processor time."""
    end = time.thread_time() + 0.005
    while time.thread_time() < end:
        pass


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """One thread that computes when asked to."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(burn).result()
        yield pool


@pytest.fixture
def helper(pool: ThreadPoolExecutor) -> int:
    """The number by which the kernel knows the pool's thread."""
    return pool.submit(get_native_id).result()


@pytest.fixture
def threads(pool: ThreadPoolExecutor) -> HelperThreads:
    """Those of a computation that the pool's thread has half of."""

    def compute() -> None:
        half = pool.submit(burn)
        burn()
        half.result()

    return HelperThreads(compute)


def test_a_short_text_alone_has_each_helper_on_one_core(
    threads: HelperThreads, helper: int
) -> None:
    """The thread that calls keeps its choice, and so does one that has nothing to do with it."""
    everywhere = os.sched_getaffinity(0)
    with ThreadPoolExecutor(max_workers=1) as bystander:
        other = bystander.submit(get_native_id).result()

        threads.place_for([SHORT])

        assert len(os.sched_getaffinity(helper)) == 1
        assert os.sched_getaffinity(helper) < everywhere
        assert os.sched_getaffinity(other) == os.sched_getaffinity(0) == everywhere


def test_a_helper_that_is_where_it_should_be_is_not_moved_again(
    threads: HelperThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short text waits for it."""
    moved: list[int] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda tid, _: moved.append(tid))
    monkeypatch.setattr(helper_threads, "_own_core", lambda: min(os.sched_getaffinity(0)))

    threads.place_for([SHORT])
    threads.place_for([SHORT])

    assert len(moved) == 1


def test_helpers_that_can_be_neither_moved_nor_found_help_all_the_same(
    threads: HelperThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a sandbox that does not let a process do so."""

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refused)
    threads.place_for([SHORT])

    monkeypatch.setattr(helper_threads, "_run_times", refused)
    HelperThreads(burn).place_for([SHORT])


@pytest.mark.parametrize("texts", [[SHORT, SHORT], [LONG]], ids=["two texts", "a long one"])
def test_whatever_takes_longer_leaves_the_helpers_to_the_kernel(
    threads: HelperThreads, helper: int, texts: list[str]
) -> None:
    """Also after a short one, because a busy core would hold up a whole batch."""
    threads.place_for([SHORT])

    threads.place_for(texts)

    assert os.sched_getaffinity(helper) == os.sched_getaffinity(0)


def test_the_helper_is_not_where_the_caller_is(
    threads: HelperThreads, helper: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whichever core the caller is at the moment."""
    for core in os.sched_getaffinity(0):
        monkeypatch.setattr(helper_threads, "_own_core", lambda core=core: core)
        threads.place_for([SHORT])

        assert core not in os.sched_getaffinity(helper)


def test_a_core_is_idle_unless_as_many_threads_run_as_there_are_cores(
    threads: HelperThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where nobody helps, none is idle for a helper."""
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(helper_threads, "_running", lambda: cores - 1)
    assert threads.have_idle_cores()
    assert not HelperThreads(burn).have_idle_cores()

    monkeypatch.setattr(helper_threads, "_running", lambda: cores)
    assert not threads.have_idle_cores()

    # Who woke the caller is done as soon as it has its turn.
    running = iter([cores, cores - 1])
    monkeypatch.setattr(helper_threads, "_running", lambda: next(running))
    assert threads.have_idle_cores()


def test_processes_that_compute_are_counted_until_they_end_and_those_that_sleep_are_not() -> None:
    """More of them than of whatever else runs beside a test."""
    many = 16
    with ExitStack() as ended:
        for _ in range(many):
            busy = ended.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            ended.callback(busy.kill)
        wait_until(lambda: all(helper_threads._running() > many for _ in range(100)))

    wait_until(lambda: all(helper_threads._running() <= many for _ in range(100)))


def test_no_core_is_idle_where_the_system_does_not_tell(
    threads: HelperThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a sandbox that shows nothing but processes."""

    def not_there() -> int:
        raise FileNotFoundError

    monkeypatch.setattr(helper_threads, "_running", not_there)

    assert not threads.have_idle_cores()


def test_the_core_of_the_caller_is_known() -> None:
    """It is the one that the thread is held on."""
    everywhere = os.sched_getaffinity(0)
    try:
        for core in everywhere:
            os.sched_setaffinity(0, {core})
            assert helper_threads._own_core() == core
    finally:
        os.sched_setaffinity(0, everywhere)


def test_a_helper_that_has_ended_is_left_alone(
    threads: HelperThreads, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another process's by then."""
    moved: list[int] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda tid, _: moved.append(tid))
    threads.place_for([SHORT])
    (tid,) = moved
    pool.shutdown()
    # The kernel is not done with it yet when it is joined.
    wait_until(lambda: not Path(f"/proc/self/task/{tid}").exists())

    threads.place_for([SHORT, SHORT])

    assert len(moved) == 1


def test_openvino_is_helped(converted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is loaded moves a thread when it encodes a short text, and none for a batch."""
    moved: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: moved.append(cores))

    def moves() -> list[set[int]]:
        embedder = load_embedder(replace(converted, engine="openvino"))
        embedder.encode([SHORT, LONG])
        assert moved == []
        embedder.encode([SHORT])
        return moved

    # On busy cores a helper may come too late to be found.
    wait_until(moves, 60)
    assert [len(cores) for cores in moved] == [1] * (len(os.sched_getaffinity(0)) - 1)


def test_torch_is_helped_with_a_short_text_only_where_a_core_is_idle(
    minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a busy one it computes alone, as it never does a batch."""
    import torch

    monkeypatch.setattr(helper_threads, "_running", lambda: 1)
    settings = Settings(database_url="", embedding_model=str(minilm), engine="torch")

    def helped() -> Embedder | None:
        torch.set_num_threads(2)
        embedder = load_embedder(settings)
        embedder.encode([SHORT])
        return embedder if torch.get_num_threads() == 2 else None

    # On busy cores a helper may come too late to be found.
    embedder = wait_until(helped, 60)
    monkeypatch.setattr(helper_threads, "_running", lambda: 1_000)

    embedder.encode([SHORT])
    assert torch.get_num_threads() == 1
    embedder.encode([SHORT, LONG])
    assert torch.get_num_threads() == 2


def test_torchs_helpers_soon_sleep(minilm: Path) -> None:
    """So says the library beneath that runs them, which reads it once."""
    settings = Settings(database_url="", embedding_model=str(minilm), engine="torch")
    load = "import os; from listener.config import Settings; from listener.embedder import "
    load += "load_embedder; load_embedder(Settings.from_environment(os.environ))"

    finished = subprocess.run(
        [sys.executable, "-c", load],
        env=environment(settings, OMP_DISPLAY_ENV="verbose"),
        cwd=empty_folder(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert "GOMP_SPINCOUNT = '10000'" in finished.stderr
