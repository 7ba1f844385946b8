"""One process at a time in a folder; the end of the process lets go, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from listener.errors import ConfigError


@contextmanager
def alone(
    folder: Path, refused: Callable[[OSError], ConfigError], *, waits: bool
) -> Iterator[None]:
    """Hold the folder, which is made where it isn't there; if another holds it, wait for its end.

    Raises what `refused` gives if the folder can't be made, or, without `waits`, for the
    BlockingIOError of one that is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise refused(error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise refused(error) from None
        yield
    finally:
        os.close(descriptor)
