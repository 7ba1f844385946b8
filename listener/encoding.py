"""What the model's thread does: each distinct text once, and the bad ones found among the good."""

from __future__ import annotations

import hashlib
import math
import signal
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from listener.claim import Vector
from listener.config import DIMENSION
from listener.errors import EmbeddingError, EncoderLost, ModelFault
from listener.passes import plan_passes

if TYPE_CHECKING:
    from listener.embedder import Embedder

_KNOWN_TEXT = "pump 7 reports a temperature of 71 degrees"
_UNIT_TOLERANCE = 1e-3
# Characters, each of up to four bytes: a longer text would take more memory than its vector.
_LONGEST_KEY = 400
# Characters for each token that the model computes: more than words and their spaces usually have.
_USUAL_CHARACTERS_PER_TOKEN = 16
# Where it is cut even without a space, or where what there is makes few tokens.
_MOST_CHARACTERS_PER_TOKEN = 256


@dataclass(frozen=True)
class Pass:
    """Texts that go through the model together: their indices, and the tokens with padding.

    0 tokens where nothing was counted: a text alone, or all known.
    """

    indices: list[int]
    tokens: int


@dataclass(frozen=True)
class Encoded:
    """One result per text, in order; how many texts the model saw and how many were reused."""

    results: list[Vector | EmbeddingError]
    encoded: int
    reused: int


class Encoder:
    """Owns the model: one thread, a bounded memory of vectors by text."""

    def __init__(self, load: Callable[[], Embedder], cache_texts: int) -> None:
        """`cache_texts` bounds the memory. Raises what `load` raises."""
        self._cache_texts = cache_texts
        self._cache: OrderedDict[str | bytes, Vector] = OrderedDict()
        # A watchdog's SIGABRT is for the main thread: another would tell its stack while it runs.
        self._thread = ThreadPoolExecutor(
            1, "model", signal.pthread_sigmask, (signal.SIG_BLOCK, {signal.SIGABRT})
        )
        # OpenMP keeps a team of threads for each thread that ever computed. Were the model loaded
        # (and tried) elsewhere, there would be more threads than cores, and all of them would sleep
        # and wake at each step instead of spinning: a tenth of the throughput.
        self._embedder = self._thread.submit(load).result()

    @property
    def fingerprint(self) -> str:
        """What is stored as `model` beside each vector."""
        return self._embedder.fingerprint

    def plan(self, texts: Sequence[str], most_tokens: int) -> list[Pass]:
        """Each text's pass: those of like length together, the longest first.

        Remembered texts cost nothing and go with the first pass.
        """
        known: list[int] = []
        by_text: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            (known if self._knows(text) else by_text.setdefault(text, [])).append(index)
        if len(by_text) < 2:
            return [Pass(list(range(len(texts))), 0)]
        unknown = list(by_text)
        lengths = self._lengths(unknown)
        passes = [
            Pass(
                [index for one in together for index in by_text[unknown[one]]],
                lengths[together[0]] * len(together),
            )
            for together in plan_passes(lengths, most_tokens, self._embedder.overhead_tokens)
        ]
        passes[0].indices.extend(known)
        return passes

    def _knows(self, text: str) -> bool:
        """Whether it is remembered; it will be for a while, since it counts as used."""
        try:
            self._cache.move_to_end(_key(text))
        except KeyError:
            return False
        return True

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        try:
            return self._embedder.lengths([self._beginning(text) for text in texts])
        except Exception:  # noqa: BLE001  any library error; `encode` meets it again and says whose
            return [1] * len(texts)

    def _beginning(self, text: str) -> str:
        """As much of a long text as fills the model, so that the vector is the same.

        A tokenizer would take seconds and gigabytes for what the model then leaves out. Cut at a
        space, where no tokenizer sees one word; in the end anywhere.
        """
        most = self._embedder.max_tokens
        if most is None:
            return text
        end, longest = most * _USUAL_CHARACTERS_PER_TOKEN, most * _MOST_CHARACTERS_PER_TOKEN
        while end < min(len(text), longest):
            beginning = text[: max(text.rfind(" ", 0, end), text.rfind("\n", 0, end), 0)]
            if self._embedder.lengths([beginning])[0] >= most:
                return beginning
            end *= 2
        return text[:longest]

    def submit(self, texts: Sequence[str]) -> Future[Encoded]:
        """Encode on the model's thread. The future raises ModelFault and EncoderLost."""
        return self._thread.submit(self._encode, texts)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Each distinct text that isn't remembered, once. Raises ModelFault and EncoderLost."""
        return self.submit(texts).result()

    def encode_one(self, text: str) -> Vector:
        """One unit vector, shape (384,). Raises EmbeddingError, ModelFault and EncoderLost."""
        result = self.encode([text]).results[0]
        if isinstance(result, EmbeddingError):
            raise result
        return result

    def close(self) -> None:
        """Wait for the pass in hand and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _encode(self, texts: Sequence[str]) -> Encoded:
        known: dict[str, Vector | EmbeddingError] = {}
        for text in set(texts):
            if self._knows(text):
                known[text] = self._cache[_key(text)]
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(missing, self._encode_missing(missing), strict=True))
        if any(isinstance(known[text], EmbeddingError) for text in missing):
            self._require_working_model()
        self._remember({text: known[text] for text in missing})
        return Encoded([known[text] for text in texts], len(missing), len(texts) - len(missing))

    def _encode_missing(self, texts: list[str]) -> list[Vector | EmbeddingError]:
        """Halve what fails until the texts that cause it stand alone."""
        if not texts:
            return []
        try:
            vectors = self._embedder.encode([self._beginning(text) for text in texts])
        except EncoderLost:
            raise
        except Exception as error:  # noqa: BLE001  any library error; the halves tell whose it is
            vectors, reason = None, f"{type(error).__name__}: {error}"
        # Outside of the handler, where the error would keep the memory of the failed pass.
        if vectors is None:
            if len(texts) == 1:
                return [EmbeddingError(reason)]
            half = len(texts) // 2
            return self._encode_missing(texts[:half]) + self._encode_missing(texts[half:])
        if vectors.shape != (len(texts), DIMENSION):
            raise ModelFault(
                f"the model gave an array of {vectors.shape} for {len(texts)} texts, "
                f"not {DIMENSION} numbers each"
            )
        return _checked(vectors)

    def _require_working_model(self) -> None:
        """Some texts failed. If a known good one fails too, it is not the texts."""
        result = self._encode_missing([_KNOWN_TEXT])[0]
        if isinstance(result, EmbeddingError):
            raise ModelFault(f"the model can't encode even a known text: {result}")

    def _remember(self, found: dict[str, Vector | EmbeddingError]) -> None:
        for text, result in found.items():
            if not isinstance(result, EmbeddingError):
                # A copy, because a row keeps the vectors of its whole batch.
                self._cache[_key(text)] = result.copy()
        while len(self._cache) > self._cache_texts:
            self._cache.popitem(last=False)


def _key(text: str) -> str | bytes:
    return text if len(text) <= _LONGEST_KEY else hashlib.sha256(text.encode()).digest()


def _checked(vectors: Vector) -> list[Vector | EmbeddingError]:
    """Each row, or why it must not be stored."""
    return [
        vector if abs(length - 1) <= _UNIT_TOLERANCE else _refused(float(length))
        for vector, length in zip(vectors, np.linalg.norm(vectors, axis=1), strict=True)
    ]


def _refused(length: float) -> EmbeddingError:
    if math.isfinite(length):
        return EmbeddingError(f"the model gave a vector of length {length:.4f} instead of 1")
    return EmbeddingError("the model gave a vector with NaN or infinity")
