"""What the peers with an event loop share: the model's thread, and batching by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench import peer_table
from bench.peer_table import BATCH_SIZE


class ModelThread:
    """The one thread that owns the model: two passes at a time would fight for the cores."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1)

    async def encode(self, texts: str | list[str]) -> Any:
        """As `peer_table.encode`, while the event loop goes on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, peer_table.encode, self._model, texts)


class Collector:
    """Turns many concurrent `embed(one)` into few `embed_all(several)`.

    Where a queue hands out one job at a time, those that run at the same time wait here; whatever
    waits when the last batch is done is the next.
    """

    def __init__(self, embed_all: Callable[[list[int]], Awaitable[None]]) -> None:
        """To be made where an event loop runs."""
        self._embed_all = embed_all
        self._waiting: asyncio.Queue[tuple[int, asyncio.Future[None]]] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    async def embed(self, event_id: int) -> None:
        """Return once the event's vector is stored; raise what its batch raised."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((event_id, done))
        await done

    async def _run(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH_SIZE and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                await self._embed_all([event_id for event_id, _ in batch])
            except Exception as error:  # noqa: BLE001  each job reports it to its own queue
                for _, done in batch:
                    done.set_exception(error)
            else:
                for _, done in batch:
                    done.set_result(None)
