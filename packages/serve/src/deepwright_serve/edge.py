"""What happens to every request before and after the application: id, host, key, drain, headers, one log line.

A plain ASGI wrapper around everything, so that also an unexpected error leaves with its id and headers.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import OPEN_PATHS, Keys
from .refusal import Refusal

log = logging.getLogger("deepwright.serve.access")

NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'"
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass
class Door:
    """Who may come in. `local` admits only requests that name this machine's loopback address as their host.

    Without that check, a page of another site could reach a loopback server by pointing its own name at it.
    `operator`: the keys of whoever runs the server; they open everything.
    """

    keys: Keys | None = None
    local: bool = True
    draining: bool = False
    operator: Keys | None = None

    def is_operator(self, headers: Headers) -> bool:
        """Whether a request comes from whoever runs the server."""
        return self.operator is not None and self.operator.admit(headers.get("authorization", "")) is not None

    def admit(self, path: str, headers: Headers) -> str:
        """Who comes in ("" without keys); raises `Refusal`."""
        if self.local and _host(headers.get("host", "")) not in LOCAL_HOSTS:
            raise Refusal(403, "This server answers only requests to localhost.", code="host_not_allowed")
        known = self.operator if self.is_operator(headers) else self.keys
        tenant = "" if known is None else known.admit(headers.get("authorization", ""))
        if tenant is None and path not in OPEN_PATHS:
            raise Refusal(
                401,
                "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.draining and path not in OPEN_PATHS:
            raise Refusal(
                503,
                "The server is shutting down.",
                code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        return tenant or ""


def _host(value: str) -> str:
    """A Host header without its port, in lower case."""
    value = value.strip().lower()
    end = value.find("]") + 1 if value.startswith("[") else value.find(":")
    return value[:end] if end > 0 else value


class Edge:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.perf_counter(), 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers.setdefault("cache-control", "no-store")
                headers.setdefault("content-security-policy", NOTHING_ALLOWED)
            await send(message)

        try:
            try:
                scope["state"]["tenant"] = self.door.admit(scope["path"], Headers(scope=scope))
            except Refusal as refusal:
                reply = JSONResponse(refusal.body(), refusal.status, refusal.headers)
                await reply(scope, receive, send_marked)
            else:
                await self.app(scope, receive, send_marked)
        finally:
            record = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
            }
            log.info(json.dumps(record))
