"""How a request is refused: OpenAI's error object, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    """What went wrong: a sentence, its class, the field it is about, and a word that programs can test."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Refusal(Exception):
    """Raised anywhere below a route; the application turns it into an error object with this status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def label(self) -> str:
        """One word for it, in logs and metrics."""
        return self.code or f"status_{self.status}"

    def body(self) -> dict[str, Any]:
        """The JSON of the error object."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def deadline(cls, seconds: float) -> Refusal:
        """The request took longer than it may."""
        return cls(504, f"The answer was not finished within {seconds:g} s.", code="deadline_exceeded")
