"""Server-sent events: one answer chunk an event, a comment when nothing comes, `[DONE]` at the end.

Every token of every stream is written here, in the one thread that all streams share: chunks are bytes from the
beginning, in plain dicts, and what all chunks of a stream have in common is written once (`Frame`).

The response holds its `Generation` open exactly as long as somebody listens: when the client goes away, the deadline
passes or the server is told to end, it is left, and leaving cancels the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .generation import Generation, HungUp, hang_up
from .limits import Limits
from .refusal import Refusal

# Seconds that a client which has stopped reading may hold up the end of its stream.
LAST_WORDS = 5.0


class Frame:
    """The chunks of one stream as JSON. head: what they all begin with, without choices and usage. told: in which of
    them usage, as it is by then, is told."""

    def __init__(
        self, head: dict[str, Any], told: Literal["never", "last", "always"], usage: Callable[[], BaseModel]
    ) -> None:
        self._head = to_json(head).removesuffix(b"}") + b',"choices":'
        self._told, self._usage = told, usage

    def chunk(self, choices: Sequence[dict[str, Any]]) -> bytes:
        """Some of the answers."""
        if self._told == "never":
            return self._head + to_json(choices) + b"}"
        usage = to_json(self._usage()) if self._told == "always" else b"null"
        return self._head + to_json(choices) + b',"usage":' + usage + b"}"

    def last(self) -> list[bytes]:
        """What comes behind the answers: a chunk with their usage, or nothing."""
        return [] if self._told == "never" else [self._head + b'[],"usage":' + to_json(self._usage()) + b"}"]


class EventStream(Response):
    """Sends `chunks` (JSON; b"" for a sign of life) while `generation` runs.

    The generation is entered here and now, so that a full queue is still a 429 and not an event.
    """

    media_type = "text/event-stream"
    # Proxies cut connections that are silent for about a minute.
    BEAT = 15.0

    def __init__(self, generation: Generation, chunks: AsyncIterator[bytes], limits: Limits) -> None:
        super().__init__()
        del self.headers["content-length"]
        # Ask proxies not to collect events before passing them on.
        self.headers["x-accel-buffering"] = "no"
        self._generation = generation
        self._chunks = chunks
        self._limits = limits
        generation.__enter__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            sending = asyncio.ensure_future(self._send_all(send))
            watch = asyncio.ensure_future(hang_up(receive))
            try:
                await asyncio.wait({sending, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    self._generation.record.error = HungUp.CODE
            finally:
                for task in (sending, watch):
                    task.cancel()
                await asyncio.gather(sending, watch, return_exceptions=True)
            if not sending.cancelled() and (error := sending.exception()) is not None:
                raise error
        finally:
            self._generation.__exit__()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            # The deadline also ends a client that has stopped reading: a full socket makes `send` wait.
            async with asyncio.timeout(self._limits.request_seconds):
                async for chunk in self._chunks:
                    await self._event(send, b"data: " + chunk + b"\n\n" if chunk else b": waiting\n\n")
        except TimeoutError:
            await self._fail(send, Refusal.deadline(self._limits.request_seconds))
        except Refusal as refusal:
            await self._fail(send, refusal)
        except OSError:
            return
        finally:
            if isinstance(self._chunks, AsyncGenerator):
                await self._chunks.aclose()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self._event(send, b"data: [DONE]\n\n")
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, refusal: Refusal) -> None:
        """The status is long sent; the error goes where clients look for it in a stream."""
        self._generation.record.error = refusal.label
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self._event(send, b"data: " + to_json(refusal.body()) + b"\n\n")

    @staticmethod
    async def _event(send: Send, event: bytes) -> None:
        await send({"type": "http.response.body", "body": event, "more_body": True})
