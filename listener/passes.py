"""Many texts in passes of the model: longest first, texts of like length together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Vectors = NDArray[np.float32]


def encode_in_passes(
    tokens: NDArray[np.int64], most: int, encode_pass: Callable[[Indices], Vectors]
) -> Vectors:
    """Shape (len(tokens), 384), in the order of `tokens`, the token counts of at least one text.

    `encode_pass` gets the indices of the texts of one pass, the longest first; padded to the
    length of that one they have at most `most` tokens, unless it stands alone.
    """
    longest_first = np.argsort(-tokens, kind="stable")
    vectors = np.concatenate([encode_pass(one) for one in _split(longest_first, tokens, most)])
    return vectors[np.argsort(longest_first)]


def _split(longest_first: Indices, tokens: NDArray[np.int64], most: int) -> list[Indices]:
    passes = []
    while longest_first.size:
        size = max(int(most // max(tokens[longest_first[0]], 1)), 1)
        passes.append(longest_first[:size])
        longest_first = longest_first[size:]
    return passes
