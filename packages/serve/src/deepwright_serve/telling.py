"""Telling plugins of finished requests, in a thread of its own: one that is slow, or fails, holds up no answer."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from deepwright_core.events import RequestEvent

from .record import RequestRecord

log = logging.getLogger("deepwright.serve")

# Requests that may wait to be told; what comes when it is full is told to nobody.
MOST = 1000


class Teller:
    """Calls `hear` with each request to a model, in order. `dropped` counts those that came too fast."""

    def __init__(self, hear: Callable[[RequestEvent], object]) -> None:
        self._hear = hear
        self._queue: queue.Queue[RequestRecord | None] = queue.Queue(MOST)
        self._thread = threading.Thread(target=self._run, name="telling", daemon=True)
        self.dropped = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, limit: float = 5.0) -> None:
        """Tell what waits, for at most so many seconds."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=limit)
            except queue.Full:
                return
            self._thread.join(limit)

    def tell(self, record: RequestRecord) -> None:
        """A request is over."""
        if not record.model:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            if self.dropped == 0:
                log.warning("plugins are slower than requests come; some requests are told to none of them")
            self.dropped += 1

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._hear(record.event())
            except Exception:
                log.exception("a plugin failed on request %s", record.request_id)
