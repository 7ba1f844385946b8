"""The engine for a static embedding: a table of vectors by token, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from listener import passes
from listener.counters import counters
from listener.model import ModelFiles, cannot_be_loaded, require_dimension

_TABLE = "embedding.weight"
# Lengths are told in steps of so many characters.
_STEP_CHARACTERS, _CHARACTERS_PER_TOKEN = 256, 4
# The rows of the table for more would leave the processor's cache.
_TEXTS_AT_A_TIME = 48


def fits(files: ModelFiles) -> bool:
    """Whether the model is such a table and nothing else; false for what only torch can judge."""
    kinds = [module.kind for module in files.modules()]
    if kinds not in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"]):
        return False
    if files.has_prompt() or files.shortens():
        return False
    try:
        with safe_open(files.modules()[0].directory / "model.safetensors", "np") as weights:
            # numpy has no bfloat16.
            return list(weights.keys()) == [_TABLE] and (
                weights.get_slice(_TABLE).get_dtype() in ("F32", "F16")
            )
    except (OSError, SafetensorError):
        return False


class StaticEmbedder:
    """The mean of the vectors of a text's tokens, brought to unit length; float32."""

    engine = "static"
    overhead_tokens = passes.OVERHEAD_ON_CPU

    def __init__(self, files: ModelFiles) -> None:
        """Load the table. Raises ConfigError if it is damaged or gives no 384 numbers."""
        directory = files.modules()[0].directory
        try:
            with safe_open(directory / "model.safetensors", "np") as weights:
                self._table = weights.get_tensor(_TABLE).astype(np.float32, copy=False)
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except MemoryError:
            # No ConfigError, on which systemd stays down: after a restart there may be memory.
            raise
        except Exception as error:
            # tokenizers raises bare Exception.
            raise cannot_be_loaded(files, error) from error
        self._tokenizer.no_padding()
        require_dimension(files, self._table.shape[1])
        self.fingerprint = files.fingerprint
        cut = self._tokenizer.truncation
        self.max_tokens: int | None = cut["max_length"] if cut else None

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), 384), in the order of the texts, rows of unit length.

        A text without any token gets zeros.
        """
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(one.ids, np.int64) for one in found]
        sums = np.concatenate(
            [
                self._sums(ids[start : start + _TEXTS_AT_A_TIME])
                for start in range(0, len(ids), _TEXTS_AT_A_TIME)
            ]
        )
        counters.texts_truncated += sum(bool(one.overflowing) for one in found)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        unit: NDArray[np.float32] = sums / np.maximum(norms, np.float32(1e-12))
        return unit

    def _sums(self, ids: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        if len(ids) == 1:
            # A text of a megabyte must not become a table of its own.
            tokens, counts = np.unique(ids[0], return_counts=True)
            total: NDArray[np.float32] = counts.astype(np.float32) @ self._table[tokens]
            return total[np.newaxis]
        lengths = np.array([len(one) for one in ids])
        filled = lengths > 0
        sums = np.zeros((len(ids), self._table.shape[1]), np.float32)
        if filled.any():
            starts = np.cumsum(lengths[filled]) - lengths[filled]
            rows = self._table[np.concatenate(ids)]
            sums[filled] = np.add.reduceat(rows, starts, axis=0)
        return sums

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Roughly the tokens of each text: nothing is padded, so only a long one stands out.

        Exactly where that would fill the model: else too little of a text might be taken for all.
        """
        return [self._length(text) for text in texts]

    def _length(self, text: str) -> int:
        steps = len(text) // _STEP_CHARACTERS + 1
        roughly = steps * _STEP_CHARACTERS // _CHARACTERS_PER_TOKEN
        if self.max_tokens is None or roughly < self.max_tokens:
            return roughly
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def count_tokens(self, text: str) -> int:
        """How many tokens the whole text has."""
        # Another thread may ask the one that cuts for lengths: it must not change.
        uncut = Tokenizer.from_str(self._tokenizer.to_str())
        uncut.no_truncation()
        return len(uncut.encode(text, add_special_tokens=False).ids)
