"""Keeps a sentence embedding next to every IoT event in Postgres."""

import os
from importlib.metadata import version

# numpy's BLAS starts a thread for each core, and they spin: a sixth of the processor time of a
# start, for nothing that is used here. Read once, at the import of numpy; torch shall not read it.
_IS_SET = "OPENBLAS_NUM_THREADS" in os.environ
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy  # noqa: E402, F401  between the two lines on purpose

if not _IS_SET:
    del os.environ["OPENBLAS_NUM_THREADS"]

__version__ = version("iot-event-listener")
