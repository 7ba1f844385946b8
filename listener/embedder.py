"""Text to unit vectors: what an engine is, and which one serves. Each engine has its own module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from listener import engine_openvino, engine_static
from listener.config import Settings
from listener.errors import ConfigError
from listener.model import ModelFiles, locate

_DEVICES = Path("/dev")
# A thirtieth of the default, and longer than a helper waits between the steps of a pass.
_SPINS = "10000"


class Embedder(Protocol):
    """What the listener needs of an engine."""

    engine: str
    fingerprint: str
    max_tokens: int | None
    # What one more pass costs, as if it were tokens.
    overhead_tokens: int

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), 384), rows of unit length, in the order of the texts, at least one.

        One pass of the model: each text costs as much as the longest, and all need memory at once.
        Adds those that are longer than the model reads to `counters.texts_truncated`. Raises
        EncoderLost where only a new process can go on, and whatever its library raises.
        """
        ...

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """What each text costs, in tokens; may be called while another thread encodes."""
        ...

    def count_tokens(self, text: str) -> int:
        """How many tokens the whole text has, special ones included, before any cut."""
        ...


def load_embedder(settings: Settings) -> Embedder:
    """The model of the settings on the engine that `choose_engine` names.

    Raises ConfigError if the model is missing, damaged, of another size or not converted,
    EncoderLost if a GPU fails.
    """
    files = locate(settings)
    engine = choose_engine(settings, files)
    if engine == "openvino":
        return engine_openvino.OpenVinoEmbedder.of_cache(files, settings)
    if engine == "static":
        return engine_static.StaticEmbedder(files)
    # Read when torch is imported. By default a helper spins for milliseconds after a pass, on the
    # core on which the thread that waits for the vectors would wake.
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    # Imports torch: seconds, and hundreds of megabytes.
    from listener.engine_torch import SentenceTransformersEmbedder

    return SentenceTransformersEmbedder(files)


def choose_engine(settings: Settings, files: ModelFiles) -> str:
    """torch, openvino or static; imports none of them. At one precision all give the same vectors.

    Raises ConfigError if the settings ask for what no engine does.
    """
    if settings.engine == "torch" and settings.precision != "fp32":
        raise ConfigError("PRECISION=bf16 is for OpenVINO; set ENGINE=openvino or PRECISION=fp32")
    if settings.engine == "openvino" or settings.precision != "fp32":
        return "openvino"
    if settings.engine == "torch":
        return "torch"
    if engine_static.fits(files):
        return "static"
    if engine_openvino.is_ready(files, settings) and not _torch_has_a_gpu():
        return "openvino"
    return "torch"


def _torch_has_a_gpu() -> bool:
    """Asked without importing torch: a device, not hidden, and a build of torch that can use it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
        return False
    try:
        has_cuda = not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
    return has_cuda and any(_DEVICES.glob("nvidia[0-9]*"))
