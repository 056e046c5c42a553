"""From the engine's thread to the event loop: what the loop is to deliver, in order, as fast as it can take it.

Both threads share one interpreter, and the engine waits for it wherever a stream is being written. So the loop gives
tokens at most half of its time: after a delivery that kept it busy it rests as long, and what comes meanwhile goes out
in one piece. Few streams never notice; with hundreds, an event carries several tokens and the engine stays fast.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

# Seconds. A delivery that takes less is no burden: a rest would only make its next token late.
LIGHT = 0.002
# However long the loop was busy (with other things, perhaps), tokens wait no longer than this.
LONGEST_REST = 0.01


class Outbox(Generic[Item]):
    """`post` from any thread; `deliver` is called on the loop with everything that came since it last was."""

    def __init__(self, deliver: Callable[[list[Item]], None]) -> None:
        self._deliver = deliver
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._coming = False  # whether the loop will look by itself

    def open(self) -> None:
        """Deliver on the event loop that this is called on."""
        self._loop = asyncio.get_running_loop()

    def post(self, items: list[Item]) -> None:
        """Have these delivered. Raises RuntimeError when the loop is closed: nobody is left to tell."""
        assert self._loop is not None
        with self._lock:
            self._items += items
            if self._coming:
                return
            self._coming = True
        self._loop.call_soon_threadsafe(self._hand_over, self._loop)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            items, self._items = self._items, []
            self._coming = bool(items)
        if items:
            began = loop.time()
            try:
                self._deliver(items)
            finally:
                # Behind everybody whom the delivery has woken: they write now.
                loop.call_soon(self._rest, loop, began)

    def _rest(self, loop: asyncio.AbstractEventLoop, began: float) -> None:
        busy = loop.time() - began
        if busy < LIGHT:
            self._hand_over(loop)
        else:
            loop.call_later(min(busy, LONGEST_REST), self._hand_over, loop)
