"""Every statement of the service and the commands, with parameters to try it with."""

from __future__ import annotations

import numpy as np

from listener import queries
from tests.harness import TinyEmbedder

STATEMENTS: dict[str, str] = {
    name: text
    for name, text in vars(queries).items()
    # Several, which go before others.
    if name[0].isupper() and name != "WITH_ALL_EVENTS"
}
# One value for every name that a statement may ask for.
PARAMETERS = {
    "bounds": [1.0],
    "live_only": False,
    "channel": "listener_help",
    "delay_seconds": 0.0,
    "duration": "1s",
    "error": "why",
    "event_id": "1",
    "event_ids": [1],
    "embedding": np.zeros(384, np.float32),
    "embeddings": [np.zeros(384, np.float32)],
    "events": 1,
    "hashes": [b""],
    "host": "here",
    "key": 470_219,
    "last": 10,
    "lease": 1,
    "lease_seconds": 1.0,
    "limit": 1,
    "lock_class": 470_219,
    "max_attempts": 5,
    "model": TinyEmbedder.fingerprint,
    "moment": 0.0,
    "most_deaths": 5,
    "payload": "",
    "pid": 1,
    "position": "(0,1)",
    "retry_seconds": 1.0,
    "since": None,
    "start": None,
    "versions": [1],
    "worker": 1,
}
