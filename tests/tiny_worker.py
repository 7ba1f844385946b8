"""`python -m tests.tiny_worker run`: the real command with a model that is instant and can kill.

A text with "segfault" in it ends the process as a broken library does, with one with "gpu" nothing
more can be computed, one with "hang" never returns, one with "slow" takes SLOW_SECONDS. DIE_AT
names the step at which the process kills itself, HANG_AT the one from which its loop does not
return.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from listener import cli, commands_run, health
from listener.config import Settings
from listener.encoding import Encoder
from listener.errors import EncoderLost
from listener.logs import log
from listener.queue import Queue
from listener.service import Service
from listener.wakeup import Wakeup
from tests.harness import TinyEmbedder

# Before the step, or once the server has carried it out and its answer was not yet acted on.
STEPS: dict[str, tuple[type, str, str]] = {
    "before the claim": (Queue, "claim", "before"),
    "after the claim": (Queue, "claim", "after"),
    "while encoding": (TinyEmbedder, "encode", "before"),
    "before the write": (Queue, "write", "before"),
    "after the write": (Queue, "_write", "after"),
    "during the backfill": (Queue, "sweep", "after"),
    "during LISTEN": (Wakeup, "listen", "after"),
}


# Longer than a test may be held up between the log's line and what it does then.
_SLOW_SECONDS = float(os.environ.get("SLOW_SECONDS", "8"))


class DeadlyEmbedder(TinyEmbedder):
    """Kills the process, hangs or dawdles, as the text says."""

    _gpu_has_failed = False

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if any("segfault" in text for text in texts):
            os.kill(os.getpid(), signal.SIGSEGV)
        self._gpu_has_failed = self._gpu_has_failed or any("gpu" in text for text in texts)
        if self._gpu_has_failed:
            raise EncoderLost("the GPU failed")
        while any("hang" in text for text in texts):
            time.sleep(1)
        if _SLOW_SECONDS and any("slow" in text for text in texts):
            log(logging.INFO, "encoding_slowly")
            time.sleep(_SLOW_SECONDS)
        return super().encode(texts)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        time.sleep(1)


def _end_at(step: str, end: Callable[[], None]) -> None:
    owner, name, when = STEPS[step]
    original: Callable[..., Any] = getattr(owner, name)

    def ending(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named) if when == "after" else None
        # An answer of nothing is not the step.
        if when == "before" or result:
            end()
        return result

    setattr(owner, name, ending)


def _load_encoder(settings: Settings) -> Encoder:
    return Encoder(DeadlyEmbedder, settings.cache_texts)


if __name__ == "__main__":
    setattr(commands_run, "load_encoder", _load_encoder)  # noqa: B010  mypy: not exported there
    if "DIE_AT" in os.environ:
        _end_at(os.environ["DIE_AT"], _die)
    if "DIE_AT_LOSS" in os.environ:
        # As one that the kernel kills while it receives too much: the server then commits nothing.
        setattr(Service, "_suspect", lambda *_: _die())  # noqa: B010  mypy: a method is not assigned to
    if "HANG_AT" in os.environ:
        # Longer than the beat of an idle loop.
        health.STALLED_SECONDS = 4.0
        _end_at(os.environ["HANG_AT"], _hang)
    cli.main()
