"""The answers of one request, from admission to the last token, and the ways in which they can end early.

A `Generation` is entered (all its answers are queued, or the request is refused), iterated (updates as tokens come)
and left; leaving cancels in the engine whatever is unfinished. So a client that hangs up, a deadline and an error all
free the engine in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from deepwright_core.engine import SamplingParams, TokenEvent, TokenScore

from .answer import Answer, Delta
from .arrivals import Arrivals
from .limits import Limits
from .protocol import ChatFinishReason, Prices, Usage
from .record import ABORTED, FAILED, RequestRecord
from .refusal import Refusal
from .roster import Served
from .scheduling import Ticket

Result = TypeVar("Result")


@dataclass(slots=True)
class Update:
    """What came since the last update for one answer."""

    index: int
    delta: Delta
    finish_reason: ChatFinishReason | None = None

    def then(self, later: Update) -> Update:
        """Both in one piece."""
        return Update(self.index, self.delta + later.delta, later.finish_reason or self.finish_reason)


class Generation:
    """Answers to `prompts`, one for each entry of `answers`, in that order."""

    def __init__(
        self,
        served: Served,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        answers: Sequence[Answer],
        record: RequestRecord,
        prices: Prices | None = None,
    ) -> None:
        self._thread = served.thread
        self.record = record
        self._model = served.name
        self.answers = answers
        self._prices = prices
        self._arrivals: Arrivals[tuple[int, TokenEvent | Refusal]] = Arrivals()
        self._tickets = [
            Ticket(prompt, sampling, self._sink(index), record.tenant.salt, served.adapter)
            for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True))
        ]
        self._unfinished = set(range(len(self._tickets)))
        self._cached: dict[int, int] = {}
        # Of the answers that asked for them: scores of all tokens of the prompt but the first.
        self.prompt_scores: dict[int, tuple[TokenScore, ...]] = {}

    def _sink(self, index: int) -> Callable[[TokenEvent | Refusal], None]:
        def take(item: TokenEvent | Refusal) -> None:
            # Noted here, when it comes, and not when a slow reader has got so far.
            if isinstance(item, Refusal):
                self.record.finished(index, FAILED)
            elif item.token_id is not None:
                self.record.token(index, item)
                if item.finish_reason is not None:
                    self.record.finished(index, item.finish_reason)
            self._arrivals.put((index, item))

        return take

    def __enter__(self) -> Generation:
        prompts = [ticket.prompt for ticket in self._tickets]
        tenant = self.record.tenant
        tenant.enter(len(prompts), sum(len(prompts[first]) for first in self._distinct()))
        try:
            self._thread.submit(self._tickets)
        except Refusal:
            tenant.leave(len(prompts))
            raise
        self.record.begin(self._model, prompts)
        self.record.said = self.answers
        return self

    def __exit__(self, *exc: object) -> None:
        self._arrivals.close()
        for index, ticket in enumerate(self._tickets):
            self._thread.cancel(ticket)
            self.record.finished(index, ABORTED)
        self.record.tenant.leave(len(self._tickets))

    async def updates(self, beat: float | None = None) -> AsyncIterator[list[Update]]:
        """Updates until every answer is finished; an empty list after `beat` seconds in which nothing came."""
        while self._unfinished:
            # A reader that fell behind gets everything in one piece.
            merged: dict[int, Update] = {}
            for index, item in await self._arrivals.take(beat):
                if isinstance(item, Refusal):
                    raise item
                update = self._take(index, item)
                merged[index] = merged[index].then(update) if index in merged else update
            yield list(merged.values())

    def _take(self, index: int, event: TokenEvent) -> Update:
        answer = self.answers[index]
        if index not in self._unfinished:
            return Update(index, Delta())
        if event.token_id is None or event.finish_reason == "cancelled":
            raise Refusal(500, "The engine cancelled the request.", code="engine_failed")
        if event.prompt_scores is not None:
            self.prompt_scores[index] = event.prompt_scores
        update = Update(index, answer.push(event.token_id, event.score))
        self._cached[index] = event.cached_tokens
        if answer.stopped:
            self._thread.cancel(self._tickets[index])
            update.finish_reason = "stop"
        elif event.finish_reason is not None:
            update.delta += answer.finish()
            called = answer.calls and event.finish_reason == "stop"
            update.finish_reason = "tool_calls" if called else event.finish_reason
        if update.finish_reason is not None:
            self._unfinished.discard(index)
            self.record.finished(index, update.finish_reason)
        return update

    def _distinct(self) -> list[int]:
        """The first answer to each prompt: a prompt that several answers share counts once."""
        return list({id(ticket.prompt): index for index, ticket in reversed(list(enumerate(self._tickets)))}.values())

    def usage(self) -> Usage:
        """Tokens so far."""
        distinct = self._distinct()
        return Usage.count(
            prompt=sum(len(self._tickets[first].prompt) for first in distinct),
            completion=sum(answer.tokens for answer in self.answers),
            cached=sum(self._cached.get(first, 0) for first in distinct),
            reasoning=sum(answer.reasoning_tokens for answer in self.answers),
            prices=self._prices,
        )


class HungUp(Exception):
    """The client is gone; nobody is left to answer."""

    CODE = "hung_up"


async def hang_up(receive: Receive) -> None:
    """Return when the client has closed the connection (its body must have been read)."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_hung_up(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled (and `HungUp` raised) when the client goes away first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(hang_up(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def finish(http: Request, generation: Generation, limits: Limits) -> list[Any]:
    """Run to the end; the finish reason of each answer."""

    async def collect() -> list[Any]:
        reasons: list[Any] = [None] * len(generation.answers)
        async for updates in generation.updates():
            for update in updates:
                reasons[update.index] = update.finish_reason or reasons[update.index]
        return reasons

    with generation:
        try:
            async with asyncio.timeout(limits.request_seconds):
                return await unless_hung_up(http, collect())
        except TimeoutError:
            raise Refusal.deadline(limits.request_seconds) from None
