"""Which texts go through the model together: those of like length, with the least padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

# What one more pass costs, as if it were tokens. On a CPU the weights go through the caches once
# more; a GPU waits for hundreds of calls of Python, and computes thousands of tokens in that time.
OVERHEAD_ON_CPU, OVERHEAD_ON_GPU = 40, 1000


def plan_passes(
    lengths: Sequence[int], most: int, overhead: int = OVERHEAD_ON_CPU
) -> list[list[int]]:
    """Indices of `lengths`, the tokens of each text, by pass; the longest texts first.

    In a pass each text is padded to the longest. So padded it has at most `most` tokens, unless it
    is one text alone. `overhead` is what one more pass costs, in tokens.
    """
    of_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        of_length[max(length, 1)].append(index)
    longest_first = sorted(of_length, reverse=True)
    passes = []
    for first, end in _cheapest_cuts(
        longest_first, [len(of_length[n]) for n in longest_first], most, overhead
    ):
        together = [index for length in longest_first[first:end] for index in of_length[length]]
        size = _most_texts(longest_first[first], most)
        passes += [together[start : start + size] for start in range(0, len(together), size)]
    return passes


def _cheapest_cuts(
    lengths: Sequence[int], counts: Sequence[int], most: int, overhead: int
) -> list[tuple[int, int]]:
    """Runs of `lengths`, descending, each padded to its first, so that all cost least together."""
    # The cost of all lengths before the index, and where the last run of them begins.
    cost, begins = [0], [0]
    for end in range(1, len(lengths) + 1):
        texts, choices = 0, []
        for first in range(end - 1, -1, -1):
            texts += counts[first]
            passes = -(-texts // _most_texts(lengths[first], most))
            run = texts * lengths[first] + passes * overhead
            choices.append((cost[first] + run, first))
        cheapest, first = min(choices)
        cost.append(cheapest)
        begins.append(first)
    runs, end = [], len(lengths)
    while end:
        runs.append((begins[end], end))
        end = begins[end]
    return runs[::-1]


def _most_texts(longest: int, most: int) -> int:
    return max(most // longest, 1)
