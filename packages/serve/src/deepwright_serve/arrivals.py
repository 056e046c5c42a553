"""What has come for one reader and has not been taken.

Less than a queue under a timeout, because every token of every stream passes here: a wait makes one future, and a
stream has one timer for all its waits. Left out: a bound (what comes is bounded by a request's max_tokens), and a
second reader.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Arrivals(Generic[Item]):
    """`put` on the event loop; `take` gives everything that has come since."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: Item) -> None:
        """Something came."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self, beat: float | None = None) -> list[Item]:
        """All that came, as soon as something has; empty after `beat` seconds in which nothing did."""
        if not self._items:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            self._waits_since = loop.time()
            if beat is not None and self._timer is None:
                self._timer = loop.call_at(self._waits_since + beat, self._look, loop, beat)
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items

    def _look(self, loop: asyncio.AbstractEventLoop, beat: float) -> None:
        """End the wait if it has lasted `beat` seconds; else look again when it will have."""
        now = loop.time()
        self._timer = None
        if self._waiter is None or self._waiter.done():
            self._timer = loop.call_at(now + beat, self._look, loop, beat)
        elif now < self._waits_since + beat:
            self._timer = loop.call_at(self._waits_since + beat, self._look, loop, beat)
        else:
            self._waiter.set_result(None)

    def close(self) -> None:
        """Nobody will take any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
