"""Passes of the model: every text once, none too long, and no way to pad less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listener.encoding import Encoder
from listener.passes import OVERHEAD_ON_CPU, OVERHEAD_ON_GPU, plan_passes
from tests.harness import Database, TinyEmbedder, serving, wait_until

MOST = 100

lengths_of_texts = st.lists(st.integers(0, 130), min_size=1, max_size=60)


def cost(lengths: Sequence[int], passes: Sequence[Sequence[int]], overhead: int) -> int:
    return sum(overhead + len(one) * max(1, *(lengths[index] for index in one)) for one in passes)


def all_cuts(lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to cut the texts, sorted by length, into passes that fit."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for count in range(len(order)):
        for cuts in combinations(range(1, len(order)), count):
            edges = [0, *cuts, len(order)]
            passes = [order[a:b] for a, b in pairwise(edges)]
            if all(len(one) == 1 or len(one) * lengths[one[0]] <= MOST for one in passes):
                yield passes


@settings(deadline=None)
@given(lengths_of_texts)
def test_every_text_is_in_one_pass_and_no_pass_is_too_long(lengths: list[int]) -> None:
    """With its padding; but one text alone may be longer."""
    passes = plan_passes(lengths, MOST)

    assert sorted(index for one in passes for index in one) == list(range(len(lengths)))
    for one in passes:
        assert len(one) == 1 or len(one) * max(lengths[index] for index in one) <= MOST


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([2, 3, 20, 21, 22, 90, 120]), min_size=1, max_size=8),
    st.sampled_from([OVERHEAD_ON_CPU, OVERHEAD_ON_GPU]),
)
def test_no_other_cut_of_distinct_lengths_costs_less(lengths: list[int], overhead: int) -> None:
    """Compared with every other, where each length is there once."""
    lengths = sorted(set(lengths))

    found = cost(lengths, plan_passes(lengths, MOST, overhead), overhead)

    assert found == min(cost(lengths, passes, overhead) for passes in all_cuts(lengths))


def test_like_lengths_go_together_and_the_longest_first() -> None:
    """Ten words are not padded to a hundred."""
    lengths = [10, 100, 10, 11, 100]

    assert plan_passes(lengths, 1000) == [[1, 4], [3, 0, 2]]
    assert plan_passes(lengths, 1000, OVERHEAD_ON_GPU) == [[1, 4, 3, 0, 2]]


@pytest.fixture
def encoder() -> Iterator[Encoder]:
    encoder = Encoder(TinyEmbedder, cache_texts=100)
    yield encoder
    encoder.close()


def test_a_text_that_repeats_or_is_remembered_costs_nothing(encoder: Encoder) -> None:
    """Equal texts share a pass; what is known goes with the first."""
    encoder.encode(["known"])
    long, short = "word " * 200, "word"

    passes = encoder.plan([short, "known", long, short, long], 1000)

    assert [(one.indices, one.tokens) for one in passes] == [([2, 4, 1], 200), ([0, 3], 1)]


def test_a_text_that_no_tokenizer_takes_is_left_to_the_encode() -> None:
    """It is the event's failure, not the end of the service."""

    class Refusing(TinyEmbedder):
        def lengths(self, texts: Sequence[str]) -> list[int]:
            raise ValueError(f"no token for {texts[0]}")

    encoder = Encoder(Refusing, cache_texts=0)

    assert [one.indices for one in encoder.plan(["a", "b"], 10)] == [[0, 1]]
    encoder.close()


def test_of_a_long_text_the_model_is_given_what_fills_it() -> None:
    """Up to a space or line end, or what a bound allows where none is found that fills it."""
    embedder = TinyEmbedder()
    encoder = Encoder(lambda: embedder, cache_texts=0)
    words, lines, blob = "word " * 100_000, "word\n" * 100_000, "x" * 1_000_000

    for text in (words, lines, blob):
        encoder.encode([text])

    *beginnings, cut = embedder.encoded
    for text, beginning in zip((words, lines), beginnings, strict=True):
        assert text.startswith(beginning)
        assert beginning.endswith("word")
        assert 512 <= len(beginning.split()) < 2_000
    assert blob.startswith(cut)
    assert len(cut) == 512 * 256
    encoder.close()


@pytest.mark.parametrize("failed_before", [0, 1])
def test_a_new_event_passes_the_rest_of_a_claimed_backfill(
    database: Database, failed_before: int
) -> None:
    """It waits for the passes that the model has, not for the claim, also where one is a retry."""
    embedder = TinyEmbedder()
    database = database.with_settings(batch_tokens=60)
    ids = database.insert(*("word " * (10 + number) for number in range(40)))
    database.forget_queue()
    database.rows("insert into listener.queue (event_id, lane) select unnest(%s::bigint[]), 1", ids)
    database.rows(
        "update listener.queue set attempts = %s where event_id = %s", failed_before, ids[0]
    )
    embedder.may_run.clear()
    with serving(database.with_settings(backfill_last_n=0), embedder):
        wait_until(lambda: sum(row.is_claimed for row in database.queue()) == 40)
        database.insert("new")
        embedder.may_run.set()
        database.wait_for_rest()

    place = next(i for i, text in enumerate(embedder.encoded) if text.endswith("new"))
    assert 0 < place < 10
    assert len(embedder.encoded) == 41
