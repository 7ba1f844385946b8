"""One model in a process that does nothing else, and what it takes for a text alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from bench import peer_table
from listener.config import Settings
from listener.embedder import load_embedder

Encode = Callable[[list[str]], object]

# Of the process that has it.
_encode: list[Encode] = []


def bare(model: Path) -> Encode:
    """The library's call, as a user writes it."""
    return partial(peer_table.encode, peer_table.load_model(str(model)))


def own(settings: Settings) -> Encode:
    """The call that the service makes."""
    return load_embedder(settings).encode


@contextmanager
def timed(load: Callable[[], Encode]) -> Iterator[Callable[[str], float]]:
    """The milliseconds that what `load` gives takes for a text, measured where it runs."""
    with ProcessPoolExecutor(1, get_context("spawn"), _load, (load,)) as pool:

        def milliseconds(text: str) -> float:
            return pool.submit(_time, text).result()

        yield milliseconds


def _load(load: Callable[[], Encode]) -> None:
    _encode.append(load())


def _time(text: str) -> float:
    began = time.perf_counter()
    _encode[0]([text])
    return (time.perf_counter() - began) * 1000
