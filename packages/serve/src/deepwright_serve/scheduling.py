"""The one thread that owns the engine, and the way requests talk to it.

Everything of the engine (add, cancel, step) happens in this thread; requests put commands into a queue and get their
tokens back on the event loop. A reader that is slow only lets its own tokens pile up, and those are bounded by the
request's max_tokens. Counting and refusing happen on the event loop, so nothing here needs a lock.

The engine is first come, first served, so it is given only what it can soon begin; the rest waits here, where tenants
are served in turn.

Left out: priorities between requests of one tenant.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepwright_core.engine import EngineStats, SamplingParams, TokenEvent
from deepwright_core.errors import RequestError

from .limits import Limits
from .refusal import Refusal
from .waiting import FairQueue

log = logging.getLogger("deepwright.serve")

# A step that fails this often in a row means that the engine is lost, not that one request was bad.
FAILURES_IN_A_ROW = 3
# Answers that wait inside the engine at most: enough to fill a step with prompts, few enough that a tenant which has
# come first is not far ahead of one which comes now.
AHEAD = 16
# Longest time that a client is told to wait before it tries again, in seconds.
LONGEST_RETRY = 60


class EngineLike(Protocol):
    """What the thread asks of an engine."""

    def add(self, prompt_ids: list[int], params: SamplingParams, *, salt: str, adapter: str) -> Any:
        """Queue a prompt for an adapter ("": none); returns its id."""

    def cancel(self, request_id: Any) -> Any:
        """Forget a request and free what it holds."""

    def step(self) -> Sequence[TokenEvent]:
        """Generate for everything that runs."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def stats(self) -> EngineStats:
        """Where it stands, and what it has done."""


@dataclass(eq=False)
class Ticket:
    """One answer being generated. `sink` is called on the event loop with each token, or with what went wrong.

    Tenants never share cached prefixes: how fast an answer begins would tell one what another has asked.
    give_up: when it has waited long enough for its turn, in seconds of `time.monotonic`.
    """

    prompt: list[int]
    params: SamplingParams
    sink: Callable[[TokenEvent | Refusal], None]
    tenant: str = ""
    adapter: str = ""
    give_up: float = math.inf
    engine_id: Any = None
    cancelled: bool = False
    done: bool = False


# What a ticket hears: a token, a refusal, or (None) that it is gone from the engine.
Parcel = tuple[Ticket, TokenEvent | Refusal | None]


def _interrupted(reason: str, lost: bool) -> Refusal:
    return Refusal(503 if lost else 500, f"Generation was interrupted: {reason}.", code="engine_failed")


class EngineThread:
    """Runs an engine for an asyncio application. `capacity` bounds the answers that run or wait.

    answered, failed: answers that were completed, and those that the engine broke off.
    """

    def __init__(self, engine: EngineLike, limits: Limits) -> None:
        self._engine = engine
        self._running = limits.running
        self._queue_seconds = limits.queue_seconds
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._queue: FairQueue[Ticket] = FairQueue()
        self._active: dict[Any, Ticket] = {}
        self._ends: deque[float] = deque(maxlen=64)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.capacity = limits.running + limits.waiting
        self.open = 0
        self.answered = 0
        self.failed = 0
        self.broken: str | None = None
        self.last_token_at = -float("inf")
        self._token_seen = asyncio.Event()

    @property
    def replicas(self) -> tuple[EngineThread, ...]:
        """The threads behind this one name: itself."""
        return (self,)

    @property
    def stats(self) -> EngineStats:
        """The engine's, with those that wait here counted among the waiting."""
        stats = self._engine.stats
        return dataclasses.replace(stats, waiting=stats.waiting + len(self._queue))

    # Called on the event loop ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin; must be called on the event loop that the requests live on."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """End after the step in progress; what still runs is told so."""
        self._inbox.put(("stop", None))

    async def stop(self, limit: float = 10.0) -> None:
        """Interrupt, wait until the thread has ended, and let go of the engine, whoever still knows this thread."""
        if self._thread is not None:
            self.interrupt()
            await asyncio.to_thread(self._thread.join, limit)
            if not self._thread.is_alive():
                self.__dict__.pop("_engine", None)

    def submit(self, tickets: Iterable[Ticket]) -> None:
        """Hand answers to the engine, all or none; raises `Refusal` when there is no room."""
        tickets = list(tickets)
        if self.broken is not None:
            raise Refusal(503, f"The engine has stopped: {self.broken}.", code="engine_failed")
        if self.open + len(tickets) > self.capacity:
            raise Refusal(
                429,
                f"{self.open} of {self.capacity} places are taken and {len(tickets)} more were asked for; "
                "wait a moment and try again.",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after(self.open + len(tickets) - self.capacity))},
            )
        self.open += len(tickets)
        give_up = time.monotonic() + self._queue_seconds
        for ticket in tickets:
            ticket.give_up = give_up
            self._inbox.put(("add", ticket))

    def _retry_after(self, places: int) -> int:
        """Whole seconds in which so many answers will have ended, if they go on ending as they lately did."""
        if len(self._ends) < 2:
            return 1
        seconds = (time.monotonic() - self._ends[0]) * places / len(self._ends)
        return min(max(math.ceil(seconds), 1), LONGEST_RETRY)

    def cancel(self, ticket: Ticket) -> None:
        """Stop an answer, whatever its state; its sink hears nothing more."""
        if not (ticket.done or ticket.cancelled):
            ticket.cancelled = True
            self._inbox.put(("cancel", ticket))

    async def wait_for_token(self) -> None:
        """Return when the engine next generates a token for anybody."""
        self._token_seen.clear()
        await self._token_seen.wait()

    def _deliver(self, items: list[Parcel]) -> None:
        if any(isinstance(item, TokenEvent) and item.token_id is not None for _, item in items):
            self.last_token_at = time.monotonic()
            self._token_seen.set()
        for ticket, item in items:
            if ticket.done:
                continue
            if item is None or isinstance(item, Refusal) or item.finish_reason is not None:
                ticket.done = True
                self.open -= 1
                self._ends.append(time.monotonic())
                if isinstance(item, Refusal):
                    self.failed += item.code == "engine_failed"
                elif item is not None and item.finish_reason != "cancelled":
                    self.answered += 1
            if item is not None and not ticket.cancelled:
                ticket.sink(item)

    # In the engine's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while True:
            try:
                working = self.broken is None and (self._engine.has_work or len(self._queue) > 0)
                if not self._obey(block=not working):
                    return
                self._hand_over()
                if self.broken is not None or not self._engine.has_work:
                    continue
                events = self._engine.step()
                failures = 0
            except Exception as error:
                log.exception("an engine step failed")
                failures += 1
                self._fail_all(f"{type(error).__name__}: {error}".removesuffix("."), lost=failures >= FAILURES_IN_A_ROW)
                continue
            items: list[Parcel] = []
            for event in events:
                ticket = self._active.get(event.request_id)
                if ticket is None:
                    continue
                if event.finish_reason is not None:
                    del self._active[event.request_id]
                items.append((ticket, event))
            if items:
                self._post(items)

    def _obey(self, block: bool) -> bool:
        """Take all commands that wait (for one to come, if there is nothing else to do). False: stop."""
        while True:
            try:
                command, ticket = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            if ticket is None:
                self._fail_all("the server is shutting down", lost=True)
                return False
            if command == "add":
                self._take(ticket)
            elif self._queue.remove(ticket):
                self._post([(ticket, None)])
            elif ticket.engine_id in self._active:
                del self._active[ticket.engine_id]
                self._engine.cancel(ticket.engine_id)
                self._post([(ticket, None)])

    def _take(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            self._post([(ticket, None)])
        elif self.broken is not None:
            self._post([(ticket, _interrupted(self.broken, lost=True))])
        else:
            self._queue.push(ticket)

    def _hand_over(self) -> None:
        """Give the engine as many of the waiting as it can soon begin."""
        for ticket in self._queue.late(time.monotonic()):
            waited = f"The request waited for {self._queue_seconds:g} s without getting its turn; try again later."
            self._post([(ticket, Refusal(503, waited, code="queue_timeout", headers={"Retry-After": "5"}))])
        while len(self._queue) and len(self._active) < self._running and self._engine.stats.waiting < AHEAD:
            self._add(self._queue.pop())

    def _add(self, ticket: Ticket) -> None:
        try:
            ticket.engine_id = self._engine.add(
                ticket.prompt, ticket.params, salt=ticket.tenant, adapter=ticket.adapter
            )
        except RequestError as error:
            self._post([(ticket, Refusal(400, str(error)))])
        except Exception as error:
            log.exception("the engine refused a request")
            self._post([(ticket, _interrupted(f"{type(error).__name__}: {error}", lost=False))])
        else:
            self._active[ticket.engine_id] = ticket

    def _fail_all(self, reason: str, lost: bool) -> None:
        """Tell every running request; with `lost`, also those that wait, and refuse those to come."""
        told = list(self._active.values())
        if lost:
            self.broken = reason
            told += self._queue
            self._queue = FairQueue()
        for engine_id in self._active:
            try:
                self._engine.cancel(engine_id)
            except Exception:
                log.exception("a request could not be cancelled after a failed step")
        refusal = _interrupted(reason, lost)
        items: list[Parcel] = [(ticket, refusal) for ticket in told]
        self._active.clear()
        self._post(items)

    def _post(self, items: list[Parcel]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, items)
        except RuntimeError:
            # The loop is closed: nobody is left to tell.
            self.broken = "the server is shutting down"
