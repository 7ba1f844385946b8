"""The fast engine for a CPU: OpenVINO, on a model that `listener model convert` has converted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from listener import passes
from listener.config import Settings
from listener.counters import counters
from listener.errors import ConfigError
from listener.helper_threads import HelperThreads
from listener.model import ModelFiles

# Raised when converted models of before can't be used any more.
FORMAT = 1
MANIFEST, GRAPH, WEIGHTS, TOKENIZER = "manifest.json", "model.xml", "model.bin", "tokenizer.json"
COMPILED = "compiled"

# Least cosine with the vectors of torch. Those of bf16 have a fingerprint of their own.
EXACT = 0.9999
_LEAST_COSINE = {"fp32": EXACT, "bf16": 0.99}
# OpenVINO keeps what it compiled for the last 5,000 shapes, a quarter of a MiB each, and meets so
# many within days. These are enough for the usual lengths.
_SHAPES = 256
_HINTS = {"fp32": "f32", "bf16": "bf16"}


def load_openvino() -> Any:
    """Import openvino without what it would import to convert, and to send statistics.

    `import openvino` tells its makers of each import, unless openvino_telemetry is missing.
    Raises ConfigError if it isn't installed.
    """
    if not is_installed():
        raise ConfigError(
            "the package openvino is not installed; pip install 'iot-event-listener[fast]' or set "
            "ENGINE=torch"
        )
    for unwanted in ("openvino_telemetry", "openvino.tools.ovc"):
        # None is how Python is told that a module is not there.
        sys.modules.setdefault(unwanted, None)  # type: ignore[arg-type]
    # Read by oneDNN, the library beneath, at its first use.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_SHAPES))
    import openvino

    return openvino


def is_installed() -> bool:
    """Whether openvino could be imported; does not import it."""
    return find_spec("openvino") is not None


def converted_directory(files: ModelFiles, settings: Settings) -> Path:
    """Where the converted model is, or would be: by its contents, so that none serves another."""
    return settings.model_cache / "openvino" / files.contents[:24]


def is_ready(files: ModelFiles, settings: Settings) -> bool:
    """Whether openvino is installed and the model converted; does not import it.

    A directory that this account may not enter is none.
    """
    manifest = converted_directory(files, settings) / MANIFEST
    return is_installed() and os.access(manifest, os.R_OK)


class OpenVinoEmbedder:
    """OpenVINO on the CPU; pooling and unit length are part of the graph."""

    engine = "openvino"
    overhead_tokens = passes.OVERHEAD_ON_CPU

    @classmethod
    def of_cache(cls, files: ModelFiles, settings: Settings) -> OpenVinoEmbedder:
        """The model as `listener model convert` left it. Raises ConfigError if it did not."""
        load_openvino()
        directory = converted_directory(files, settings)
        if not os.access(directory, os.F_OK):
            raise ConfigError(
                f"{files.name} is not converted for OpenVINO; run `listener model convert` or set "
                "ENGINE=torch and PRECISION=fp32"
            )
        return cls(files, directory)

    def __init__(self, files: ModelFiles, directory: Path) -> None:
        """Load the converted model of `files`.

        Raises ConfigError if it is damaged, of another model, or the CPU lacks the precision.
        """
        openvino = load_openvino()
        core = openvino.Core()
        _require_precision(core, files.precision)
        try:
            manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
            self._require_own(manifest, files)
            self.max_tokens: int | None = manifest["max_tokens"]
            self._pad_id: int = manifest["pad_id"]
            self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
            if self.max_tokens is not None:
                self._tokenizer.enable_truncation(self.max_tokens)
            self._request = _compile(core, directory, files.precision).create_infer_request()
            self._require_known_vectors(manifest, _LEAST_COSINE[files.precision])
            self._helpers = HelperThreads(lambda: self._compute(manifest["texts"][:1]))
        except MemoryError:
            # No ConfigError, on which systemd stays down: after a restart there may be memory.
            raise
        except Exception as error:
            # Both libraries raise bare RuntimeError and Exception.
            raise ConfigError(
                f"the converted model in {directory} can't be loaded "
                f"({type(error).__name__}: {_first_line(error)}); run `listener model convert`"
            ) from error
        self.fingerprint = files.fingerprint

    @staticmethod
    def _require_own(manifest: dict[str, Any], files: ModelFiles) -> None:
        if (manifest["format"], manifest["contents"]) != (FORMAT, files.contents):
            raise ValueError(f"it is of {manifest['contents'][:12]}, format {manifest['format']}")

    def _require_known_vectors(self, manifest: dict[str, Any], least: float) -> None:
        """Damaged weights still load; a vector that torch gave for a text tells."""
        known = np.array(manifest["vectors"], np.float32)
        cosine = float((self._compute(manifest["texts"]) * known).sum(axis=1).min())
        if not cosine >= least:
            raise ValueError(f"a known text's vector is off, cosine {cosine:.4f}")

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), 384), rows of unit length, in the order of the texts."""
        self._helpers.place_for(texts)
        return self._compute(texts)

    def _compute(self, texts: Sequence[str]) -> NDArray[np.float32]:
        found = self._tokenizer.encode_batch_fast(list(texts))
        ids = [one.ids for one in found]
        lengths = np.array([len(one) for one in ids])
        mask = np.arange(lengths.max()) < lengths[:, np.newaxis]
        padded = np.full(mask.shape, self._pad_id, np.int64)
        padded[mask] = np.concatenate([np.array(one, np.int64) for one in ids])
        vectors: NDArray[np.float32] = self._request.infer([padded, mask.astype(np.int64)])[0]
        counters.texts_truncated += sum(bool(one.overflowing) for one in found)
        return vectors

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text that the model computes."""
        return [len(one.ids) for one in self._tokenizer.encode_batch_fast(list(texts))]

    def count_tokens(self, text: str) -> int:
        """How many tokens the whole text has, special ones included."""
        # Another thread may ask the one that cuts for lengths: it must not change.
        uncut = Tokenizer.from_str(self._tokenizer.to_str())
        uncut.no_truncation()
        return len(uncut.encode(text).ids)


def _compile(core: Any, directory: Path, precision: str) -> Any:
    if not (directory / WEIGHTS).is_file():  # else the graph alone fails, and says nothing of it
        raise FileNotFoundError(WEIGHTS)
    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": _cores(),
        # Two workers that both pin their threads to core 0 wait for each other.
        "ENABLE_CPU_PINNING": False,
        "CPU_RUNTIME_CACHE_CAPACITY": _SHAPES,
    }
    graph, compiled = str(directory / GRAPH), directory / COMPILED
    # What compiling gives, kept. `listener model convert` makes it.
    if compiled.is_dir():
        # They may be of another CPU, and the folder closed to us. OpenVINO raises nothing finer.
        with suppress(RuntimeError):
            return core.compile_model(graph, "CPU", {**options, "CACHE_DIR": str(compiled)})
    return core.compile_model(graph, "CPU", options)


def _cores() -> int:
    """Those that this process may use; macOS doesn't say."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _require_precision(core: Any, precision: str) -> None:
    offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in offered:
        raise ConfigError("this CPU has no bf16 arithmetic; set PRECISION=fp32")


def _first_line(error: Exception) -> str:
    """The first line that says something; OpenVINO begins with where it was thrown."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return next((line for line in lines if not line.startswith("Exception from")), "")
