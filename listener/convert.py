"""`listener model convert`: a sentence-transformers model into one that OpenVINO computes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from listener import engine_openvino
from listener.alone import alone
from listener.config import Settings
from listener.engine_openvino import OpenVinoEmbedder, converted_directory, load_openvino
from listener.engine_torch import SentenceTransformersEmbedder
from listener.errors import ConfigError
from listener.model import ModelFiles, locate
from listener.passes import plan_passes

_CONVERTIBLE = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
# Kept with the model; at each start they are encoded again.
_KNOWN_TEXTS = ("pump 7 reports a temperature of 71 degrees", "door left open")
_MOST_TOKENS = 1024
_UNFINISHED = ".converting-"
_WORDS = (
    "pump VALVE leaking °C 71.5 door-left open Überdruck 温度 🚰 ok offline; temperature's rising"
)


class _UnitMean(torch.nn.Module):
    """Token ids and mask to unit vectors: transformer, mean over the mask, length 1."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Shapes (n, tokens), (n, tokens) to (n, dimension)."""
        found = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        weight = attention_mask.unsqueeze(-1).to(torch.float32)
        total = (found.last_hidden_state * weight).sum(1)
        return torch.nn.functional.normalize(total / weight.sum(1).clamp(min=1e-9), dim=1)


def convert(settings: Settings) -> Path:
    """Convert the model of the settings once, and prove it. Returns the directory.

    All or nothing, and harmless twice. Raises ConfigError if the model is not of a kind that can
    be converted, or if its vectors would not be those of torch.
    """
    files = replace(locate(settings), precision="fp32")
    load_openvino()
    _require_convertible(files)
    original = SentenceTransformersEmbedder(files)
    target = converted_directory(files, settings)
    # Only what we have made is ours to open to others.
    is_new = not settings.model_cache.exists()
    # One conversion at a time, or it would take the unfinished files of another away.
    with alone(target.parent, partial(_not_writable, target.parent), waits=True):
        # One that was killed in its midst leaves its folder.
        for left in target.parent.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        if not _is_exact(original, files, target):
            _replace(target, original, files)
            # Fills the cache of compiled kernels, which knows the model by its path.
            OpenVinoEmbedder(files, target)
    # The service may run under another account, whatever the umask here.
    if is_new:
        settings.model_cache.chmod(0o755)
    for _, _, files_there, folder in os.fwalk(target.parent):
        for name in (".", *files_there):
            _open_to_others(name, folder)
    return target


def _open_to_others(name: str, folder: int) -> None:
    """Unless somebody else has made it, or put a link in its place: the folder may be theirs."""
    with suppress(OSError):
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        try:
            found = os.fstat(opened)
            if found.st_uid == os.geteuid():
                os.fchmod(
                    opened, found.st_mode & 0o777 | (0o555 if S_ISDIR(found.st_mode) else 0o444)
                )
        finally:
            os.close(opened)


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"MODEL_CACHE {folder.parent} can't be written ({error.strerror}); name a directory that "
        "can"
    )


def _require_convertible(files: ModelFiles) -> None:
    kinds = [module.kind for module in files.modules()]
    if kinds[:1] == ["StaticEmbedding"]:
        raise ConfigError(
            f"{files.name} is a static embedding, which needs no conversion; leave ENGINE=auto"
        )
    fault = ""
    if kinds not in _CONVERTIBLE:
        fault = f"it is made of {', '.join(kinds) or 'unknown modules'}"
    elif (pooling := _pooling(files.modules()[1].directory)) != "mean":
        fault = f"its pooling is {pooling}"
    elif files.has_prompt():
        fault = "it puts a prompt before each text"
    elif files.shortens():
        fault = "it leaves numbers out of each vector"
    if fault:
        raise ConfigError(
            f"{files.name} can't be converted: {fault}; only a transformer with mean pooling can, "
            "so leave ENGINE=auto or set ENGINE=torch"
        )


def _pooling(directory: Path) -> str:
    """The names of the pooling, in either spelling of its configuration."""
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "not readable"
    if not isinstance(config, dict):
        return "not readable"
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        return "+".join(map(str, modes)) if isinstance(modes, list) else str(modes)
    prefix, suffix = "pooling_mode_", "_tokens"
    chosen = [key for key, value in config.items() if key.startswith(prefix) and value is True]
    return "+".join(key.removeprefix(prefix).removesuffix(suffix) for key in chosen)


def _is_exact(original: SentenceTransformersEmbedder, files: ModelFiles, directory: Path) -> bool:
    """Whether the one in `directory` gives torch's vectors; one that can't be loaded doesn't."""
    try:
        return _least_cosine(original, files, directory) >= engine_openvino.EXACT
    except ConfigError:
        return False


def _replace(target: Path, original: SentenceTransformersEmbedder, files: ModelFiles) -> None:
    """Write beside the target, prove, then rename: half a model is never seen."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNFINISHED) as folder:
            made = Path(folder) / "made"
            made.mkdir()
            _write(made, original, files)
            least = _least_cosine(original, files, made)
            if not least >= engine_openvino.EXACT:
                raise ConfigError(
                    f"{files.name} can't be converted: a vector differs from that of torch, "
                    f"cosine {least:.6f}; leave ENGINE=auto or set ENGINE=torch"
                )
            (made / engine_openvino.COMPILED).mkdir()
            if target.exists():
                # It is no good, or we would not be here.
                target.rename(Path(folder) / "old")
            made.rename(target)
    except OSError as error:
        raise _not_writable(target.parent, error) from error


def _write(folder: Path, original: SentenceTransformersEmbedder, files: ModelFiles) -> None:
    import openvino

    tokenizer = original.model.tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(
            f"{files.name} can't be converted: it has no tokenizer.json; leave ENGINE=auto or set "
            "ENGINE=torch"
        )
    graph = _traced(original.transformer())
    try:
        openvino.save_model(graph, folder / engine_openvino.GRAPH, compress_to_fp16=False)
    except RuntimeError as error:
        # A full disk. It raises nothing finer.
        raise OSError(str(error)) from error
    (folder / engine_openvino.TOKENIZER).write_text(_bare(tokenizer), "utf-8")
    manifest = {
        "format": engine_openvino.FORMAT,
        "contents": files.contents,
        "max_tokens": original.max_tokens,
        "pad_id": tokenizer.pad_token_id,
        "texts": _KNOWN_TEXTS,
        "vectors": original.encode(_KNOWN_TEXTS).tolist(),
    }
    # Last: it says that the rest is there.
    (folder / engine_openvino.MANIFEST).write_text(json.dumps(manifest), "utf-8")


def _traced(transformer: torch.nn.Module) -> Any:
    # Undo what load_openvino does to keep the converter away.
    sys.modules.pop("openvino.tools.ovc", None)
    from openvino.tools.ovc import convert_model

    # Two texts, one padded, so that neither number is taken for a constant.
    example = {
        "input_ids": torch.ones((2, 7), dtype=torch.int64),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    }
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # The tracer doubts branches that never depend on a text; the proof below is what counts.
        warnings.simplefilter("ignore")
        graph = convert_model(_UnitMean(transformer).cpu().eval(), example_input=example)
    graph.reshape({index: [-1, -1] for index in range(len(graph.inputs))})
    return graph


def _bare(tokenizer: Any) -> str:
    """The tokenizer as JSON, without the padding and the cut of its last use."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str())


def _least_cosine(
    original: SentenceTransformersEmbedder, files: ModelFiles, directory: Path
) -> float:
    texts = _samples()
    converted = OpenVinoEmbedder(files, directory)
    passes = [
        [texts[index] for index in indices]
        for indices in plan_passes(original.lengths(texts), _MOST_TOKENS)
    ]
    together = [
        cosine for one in passes for cosine in (original.encode(one) * converted.encode(one)).sum(1)
    ]
    singly = [float(original.encode([t])[0] @ converted.encode([t])[0]) for t in texts[:8]]
    return min(float(np.min(together)), *singly)


def _samples() -> Sequence[str]:
    """Some dozens of texts: empty, with spaces, of every length up to beyond the cut."""
    words = _WORDS.split()
    mixed = [" ".join(words[(n + i * 5) % len(words)] for i in range(n)) for n in range(1, 60)]
    return ["", "  Pump\trunning \n hot  ", "\u200b\u0301", *mixed, " ".join(words * 60)]
