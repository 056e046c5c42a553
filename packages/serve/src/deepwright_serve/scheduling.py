"""The one thread that owns the engine, and the way requests talk to it.

Everything of the engine (add, cancel, step) happens in this thread; requests put commands into a queue and get their
tokens back on the event loop. A reader that is slow only lets its own tokens pile up, and those are bounded by the
request's max_tokens. Counting and refusing happen on the event loop, so nothing here needs a lock.

Left out: priorities between requests; the engine's own scheduler is first come, first served.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepwright_core.engine import SamplingParams, TokenEvent
from deepwright_core.errors import RequestError

from .refusal import Refusal

log = logging.getLogger("deepwright.serve")

# A step that fails this often in a row means that the engine is lost, not that one request was bad.
FAILURES_IN_A_ROW = 3


class EngineLike(Protocol):
    """What the thread asks of an engine."""

    def add(self, prompt_ids: list[int], params: SamplingParams, *, salt: str) -> Any:
        """Queue a prompt; returns its id."""

    def cancel(self, request_id: Any) -> Any:
        """Forget a request and free what it holds."""

    def step(self) -> Sequence[TokenEvent]:
        """Generate for everything that runs."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""


@dataclass(eq=False)
class Ticket:
    """One answer being generated. `sink` is called on the event loop with each token, or with what went wrong.

    Tenants never share cached prefixes: how fast an answer begins would tell one what another has asked.
    """

    prompt: list[int]
    params: SamplingParams
    sink: Callable[[TokenEvent | Refusal], None]
    tenant: str = ""
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

    def __init__(self, engine: EngineLike, capacity: int) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._active: dict[Any, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.capacity = capacity
        self.open = 0
        self.answered = 0
        self.failed = 0
        self.broken: str | None = None
        self.last_token_at = -float("inf")
        self._token_seen = asyncio.Event()

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
        """Interrupt, and wait until the thread has ended."""
        if self._thread is not None:
            self.interrupt()
            await asyncio.to_thread(self._thread.join, limit)

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
                headers={"Retry-After": "1"},
            )
        self.open += len(tickets)
        for ticket in tickets:
            self._inbox.put(("add", ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Stop an answer, whatever its state; its sink hears nothing more."""
        if not (ticket.done or ticket.cancelled):
            ticket.cancelled = True
            self._inbox.put(("cancel", ticket))

    async def wait_for_token(self) -> None:
        """Return when the engine next generates a token for anybody."""
        self._token_seen.clear()
        await self._token_seen.wait()

    def _deliver(self, items: list[Parcel], generated: bool) -> None:
        if generated:
            self.last_token_at = time.monotonic()
            self._token_seen.set()
        for ticket, item in items:
            if ticket.done:
                continue
            if item is None or isinstance(item, Refusal) or item.finish_reason is not None:
                ticket.done = True
                self.open -= 1
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
                working = self.broken is None and self._engine.has_work
                if not self._obey(block=not working):
                    return
                if self.broken is not None or not self._engine.has_work:
                    continue
                events = self._engine.step()
                failures = 0
            except Exception as error:
                log.exception("an engine step failed")
                failures += 1
                self._fail_all(f"{type(error).__name__}: {error}", lost=failures >= FAILURES_IN_A_ROW)
                continue
            items: list[Parcel] = []
            for event in events:
                ticket = self._active.get(event.request_id)
                if ticket is None:
                    continue
                if event.finish_reason is not None:
                    del self._active[event.request_id]
                items.append((ticket, event))
            if events:
                self._post(items, generated=any(event.token_id is not None for event in events))

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
                self._add(ticket)
            elif ticket.engine_id in self._active:
                del self._active[ticket.engine_id]
                self._engine.cancel(ticket.engine_id)
                self._post([(ticket, None)])

    def _add(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            self._post([(ticket, None)])
            return
        if self.broken is not None:
            self._post([(ticket, _interrupted(self.broken, lost=True))])
            return
        try:
            ticket.engine_id = self._engine.add(ticket.prompt, ticket.params, salt=ticket.tenant)
        except RequestError as error:
            self._post([(ticket, Refusal(400, str(error)))])
        except Exception as error:
            log.exception("the engine refused a request")
            self._post([(ticket, _interrupted(f"{type(error).__name__}: {error}", lost=False))])
        else:
            self._active[ticket.engine_id] = ticket

    def _fail_all(self, reason: str, lost: bool) -> None:
        """Tell every running request; with `lost`, refuse those to come as well."""
        if lost:
            self.broken = reason
        for engine_id in self._active:
            try:
                self._engine.cancel(engine_id)
            except Exception:
                log.exception("a request could not be cancelled after a failed step")
        refusal = _interrupted(reason, lost)
        items: list[Parcel] = [(ticket, refusal) for ticket in self._active.values()]
        self._active.clear()
        self._post(items)

    def _post(self, items: list[Parcel], generated: bool = False) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, items, generated)
        except RuntimeError:
            # The loop is closed: nobody is left to tell.
            self.broken = "the server is shutting down"
