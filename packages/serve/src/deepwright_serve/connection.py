"""A client's connection: uvicorn's, with an end to patience where uvicorn has none.

One connection too many is served nothing but a refusal: the application writes it, so that it has the form of all
others and is counted and logged. A head that does not come, or comes a byte at a time, ends the connection; so does a
client that stops reading while its answer waits in a full socket. Either would otherwise keep a connection (and the
second its answer) for ever. What is no HTTP at all is refused with an error object as everything else is.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .edge import SURPLUS, new_request_id
from .limits import Limits
from .refusal import Refusal


class Connection(H11Protocol):
    """Ends itself when nothing moves. Dropping the connection is what cancels the work for it."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self.app_state = {**self.app_state, SURPLUS: True}
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """Between requests, the next head has so long from its first byte (the very first: from the connection)."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self._limits.header_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that cannot be read as HTTP/1.1, in place of uvicorn's plain text, and close."""
        # After an answer that did not wait for its request's body, nothing more can be said in this connection.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            sentence = "This is no HTTP/1.1 request: its head or the lengths of its body cannot be read."
            body = json.dumps(Refusal(400, sentence, code="invalid_http").body()).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "x-request-id": new_request_id(),
                "connection": "close",
            }
            head = h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
