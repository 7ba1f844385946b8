"""Distinct texts of about 20 tokens, and the rows that carry them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from tokenizers import Tokenizer

from bench.models import minilm
from listener.config import Settings
from listener.database import connect

# The vocabulary is in order of frequency; the rarer words are longer than those of real texts.
_COMMONEST = 6_000
# With the two special tokens, 20 on average.
_FEWEST_WORDS, _MOST_WORDS = 12, 24


def random_texts(count: int, seed: int) -> list[str]:
    """Distinct texts of random common words, each word one token; the same for the same seed."""
    words, chance = _common_words(), random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        length = chance.randint(_FEWEST_WORDS, _MOST_WORDS)
        texts[" ".join(chance.choices(words, k=length))] = None
    return list(texts)


def _common_words() -> list[str]:
    vocabulary: dict[str, int] = Tokenizer.from_file(str(minilm() / "tokenizer.json")).get_vocab()
    by_frequency = sorted(vocabulary, key=vocabulary.__getitem__)
    words = [word for word in by_frequency if word.isascii() and word.isalpha() and len(word) > 1]
    return words[:_COMMONEST]


def copy_messages(url: str, messages: Sequence[str]) -> float:
    """One COPY of an event for each message. Returns time.perf_counter() at its commit."""
    copy = "copy public.iot_events (device_id, event_type, severity, message) from stdin"
    with connect(Settings(database_url=url), "bench") as conn:
        with conn.cursor() as cursor, cursor.copy(copy) as rows:
            for message in messages:
                rows.write_row(("pump-1", "status", "info", message))
        return time.perf_counter()


def embedded_texts(url: str) -> list[str]:
    """What the service embeds, asked of the one function that says so, in order of insertion."""
    statement = "select listener.embedding_input(e) from public.iot_events e order by e.id"
    with connect(Settings(database_url=url), "bench") as conn:
        return [text for (text,) in conn.execute(statement)]
