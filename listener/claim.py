"""What a worker gets of the queue: claims, the texts of their events, and pages of a sweep."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

EventId = int | str | UUID
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Event:
    """A claimed event: what to embed, and the version that the text belongs to."""

    event_id: EventId
    version: int
    text: str

    @property
    def content_hash(self) -> bytes:
        """sha256 of the text in UTF-8, as the database computes it."""
        return hashlib.sha256(self.text.encode()).digest()


@dataclass(frozen=True)
class Claim:
    """The events leased together under one token.

    `already_read`: those whose text came with the claim. `is_suspect`: they were claimed before and
    never answered, so the claim may be smaller than what is due. `is_full`: it took as much as it
    was allowed to. `is_new`: changes, for which somebody may be waiting.
    """

    lease: int
    event_ids: list[EventId]
    already_read: tuple[Event, ...] = ()
    is_suspect: bool = False
    is_full: bool = False
    is_new: bool = False


@dataclass(frozen=True)
class SweepPage:
    """What one page of a sweep found; `next_from` None is the end."""

    scanned: int
    queued: int
    next_from: str | None
