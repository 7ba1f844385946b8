"""Text to unit vectors; one class per engine. Importing this module imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from listener.config import DIMENSION, Settings
from listener.errors import ConfigError
from listener.model import ModelFiles, locate

_SHORT_CHARACTERS = 300


class Embedder(Protocol):
    """What the listener needs of an engine."""

    fingerprint: str
    max_tokens: int | None

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), 384), rows of unit length, in the order of the texts."""
        ...

    def count_tokens(self, text: str) -> int:
        """How many tokens the whole text has, special ones included, before any cut."""
        ...


class SentenceTransformersEmbedder:
    """sentence-transformers on torch: float32, no remote code, safetensors, offline."""

    def __init__(self, files: ModelFiles, batch_tokens: int) -> None:
        """Load the model; `batch_tokens` bounds one pass of it.

        Raises ConfigError if the model is damaged or gives no 384 numbers.
        """
        self._batch_tokens = batch_tokens
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._threads = torch.get_num_threads()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model = SentenceTransformer(
                str(files.directory),
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                # The published gte-small is fp16, which a CPU computes up to 100 times slower.
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"the model in {files.directory} can't be loaded "
                f"({type(error).__name__}: {error}); fetch it again"
            ) from error
        _require_float32(self._model, files)
        _require_dimension(self._model, files)
        self.fingerprint = files.fingerprint
        self.max_tokens: int | None = _max_tokens(self._model)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), 384), rows of unit length, in the order of the texts.

        The longest go first, in passes of like length: padding costs as much as text.
        """
        if len(texts) <= 1:
            return self._pass(texts)
        tokens = np.clip(self._count(texts), 1, self.max_tokens or np.inf)
        longest_first = np.argsort(-tokens, kind="stable")
        passes = _split(longest_first, tokens, self._batch_tokens)
        vectors = np.concatenate([self._pass([texts[i] for i in one]) for one in passes])
        return vectors[np.argsort(longest_first)]

    def _pass(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # Waking sleeping helper threads takes longer than they save on one short text.
        alone = len(texts) == 1 and len(texts[0]) <= _SHORT_CHARACTERS
        torch.set_num_threads(1 if alone else self._threads)
        vectors: NDArray[np.float32] = self._model.encode(
            list(texts),
            batch_size=max(len(texts), 1),
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return vectors

    def count_tokens(self, text: str) -> int:
        """How many tokens the whole text has, special ones included."""
        return self._count([text])[0]

    def _count(self, texts: Sequence[str]) -> list[int]:
        tokenizer: Any = self._model.tokenizer
        if hasattr(tokenizer, "encode_batch"):  # a static embedding's bare tokenizer
            return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
        ids = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [len(one) for one in ids]


def _split(
    longest_first: NDArray[np.int64], tokens: NDArray[np.float64], most: int
) -> list[NDArray[np.int64]]:
    """Cut where a pass, padded to the length of its first text, would have more than `most`."""
    passes = []
    while longest_first.size:
        size = max(int(most // tokens[longest_first[0]]), 1)
        passes.append(longest_first[:size])
        longest_first = longest_first[size:]
    return passes


def load_embedder(settings: Settings) -> SentenceTransformersEmbedder:
    """The model of the settings. Raises ConfigError if it is missing, damaged or of other size."""
    return SentenceTransformersEmbedder(locate(settings), settings.batch_tokens)


def _require_float32(model: SentenceTransformer, files: ModelFiles) -> None:
    types = {parameter.dtype for parameter in model.parameters()}
    if types - {torch.float32}:
        raise ConfigError(f"the model in {files.directory} has weights of {types}, not float32")


def _require_dimension(model: SentenceTransformer, files: ModelFiles) -> None:
    dimension = model.encode(["dimension"], show_progress_bar=False).shape[1]
    if dimension != DIMENSION:
        raise ConfigError(
            f"the model in {files.directory} gives {dimension} numbers, event_embeddings holds "
            f"{DIMENSION}; set EMBEDDING_MODEL to a {DIMENSION}-D model"
        )


def _max_tokens(model: SentenceTransformer) -> int | None:
    length = model.max_seq_length
    return int(length) if length is not None and np.isfinite(length) else None
