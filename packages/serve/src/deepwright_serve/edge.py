"""What happens to every request before and after the application: id, host, key, rate, drain, headers, record.

A plain ASGI wrapper around everything, so that also an unexpected error leaves with its id and headers, and every
request leaves one line in the log, whatever became of it.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from .keys import OPEN_PATHS, Keys
from .metrics import Metrics
from .record import RequestRecord
from .refusal import Refusal
from .telling import Teller
from .tenants import Tenant

log = logging.getLogger("deepwright.serve.access")

NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'"
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# In the state of a request's scope: it came by a connection beyond the limit.
SURPLUS = "surplus_connection"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


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
    header_bytes: int = 1 << 14

    def __post_init__(self) -> None:
        self._anybody = Tenant()

    def is_operator(self, headers: Headers) -> bool:
        """Whether a request comes from whoever runs the server."""
        return self.operator is not None and self.operator.admit(headers.get("authorization", "")) is not None

    def admit(self, path: str, headers: Headers) -> Tenant:
        """Who comes in; raises `Refusal`."""
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if size > self.header_bytes:
            raise Refusal(
                431, f"The headers have {size} bytes; at most {self.header_bytes} are taken.", code="headers_too_large"
            )
        if self.local and _host(headers.get("host", "")) not in LOCAL_HOSTS:
            raise Refusal(403, "This server answers only requests to localhost.", code="host_not_allowed")
        known = self.operator if self.is_operator(headers) else self.keys
        tenant = self._anybody if known is None else known.admit(headers.get("authorization", ""))
        if path in OPEN_PATHS:
            return tenant or self._anybody
        if tenant is None:
            raise Refusal(
                401,
                "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.draining:
            raise Refusal(
                503,
                "The server is shutting down.",
                code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        return tenant


def new_request_id() -> str:
    """An id for a request that brought none."""
    return f"req_{secrets.token_hex(12)}"


def _request_id(asked: str) -> str:
    """The id that a client gave its request, if it is one that can stand in a log; else one of ours."""
    return asked if SANE_ID.fullmatch(asked) else new_request_id()


def _too_many_connections() -> Refusal:
    return Refusal(
        503,
        "As many connections are open as this server takes; try again in a moment.",
        code="too_many_connections",
        headers={"Retry-After": "1", "Connection": "close"},
    )


def _host(value: str) -> str:
    """A Host header without its port, in lower case."""
    value = value.strip().lower()
    end = value.find("]") + 1 if value.startswith("[") else value.find(":")
    return value[:end] if end > 0 else value


class Edge:
    """The outermost ASGI application."""

    def __init__(self, app: Starlette, door: Door, metrics: Metrics, teller: Teller | None = None) -> None:
        self.app = app
        self.door = door
        self.metrics = metrics
        self._teller = teller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(
            request_id=_request_id(Headers(scope=scope).get("x-request-id", "")),
            method=scope["method"] if scope["method"] in METHODS else "other",
            metrics=self.metrics,
        )
        scope.setdefault("state", {})["record"] = record
        # HEAD is GET without the body, which uvicorn leaves out: monitors and balancers probe with it.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers.setdefault("cache-control", "no-store")
                headers.setdefault("content-security-policy", NOTHING_ALLOWED)
                headers.update(record.tenant.headers())
            await send(message)

        self.metrics.in_progress.inc()
        try:
            try:
                if SURPLUS in scope["state"]:
                    raise _too_many_connections()
                record.tenant = self.door.admit(scope["path"], Headers(scope=scope))
                if scope["path"] not in OPEN_PATHS:
                    record.tenant.knock()
            except Refusal as refusal:
                record.error = refusal.label
                reply = JSONResponse(refusal.body(), refusal.status, refusal.headers)
                await reply(scope, receive, send_marked)
            else:
                await self.app(inner, receive, send_marked)
        finally:
            self.metrics.in_progress.dec()
            record.seconds = time.monotonic() - record.began
            record.path = self._route(inner)
            self.metrics.answered(record)
            log.info("", extra={"record": record})
            if self._teller is not None:
                self._teller.tell(record)

    def _route(self, scope: Scope) -> str:
        """The template of a request's route, also of one that was refused at the door; "other" where there is none."""
        route = scope.get("route")
        if route is None:
            route = next((route for route in self.app.routes if route.matches(scope)[0] is not Match.NONE), None)
        return getattr(route, "path", "other")
