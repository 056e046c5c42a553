"""What the server writes to its log: one line a request, and the messages of everything else, as JSON or as text.

The lines of requests hold numbers and names only: no prompt, no answer, no key. A tenant's name is the one that the
key file gives it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

from .record import RequestRecord

LogFormat = Literal["json", "text"]


def start(form: LogFormat, stream: TextIO | None = None) -> None:
    """Send everything that is logged to a stream (standard error), in one form."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # One line a request is ours to write; httpx would add one for each probe of a child.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def line(record: RequestRecord) -> dict[str, Any]:
    """What is written of a request. Seconds are rounded to 0.1 ms; what is not known is left out."""
    answers = record.answers
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "tenant": record.tenant.name,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "seconds": round(record.seconds, 4),
        "error": record.error,
        "model": record.model,
    }
    if answers:
        fields |= {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "reasoning_tokens": record.reasoning_tokens,
            "queue_seconds": _rounded(record.queue_seconds),
            "first_token_seconds": _rounded(record.first_token_seconds),
            "finish_reasons": [answer.finish_reason for answer in answers],
        }
    return {name: value for name, value in fields.items() if value not in ("", None)}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


class JsonLines(logging.Formatter):
    """Every line one JSON object with time, level and logger; a request's fields stand beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        request = getattr(record, "record", None)
        if isinstance(request, RequestRecord):
            fields |= line(request)
        else:
            fields["message"] = record.getMessage()
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class TextLines(logging.Formatter):
    """Time, level, logger and message; a request's fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        request = getattr(record, "record", None)
        if isinstance(request, RequestRecord):
            values = {
                name: ",".join(value) if isinstance(value, list) else value for name, value in line(request).items()
            }
            record = logging.makeLogRecord(
                {**record.__dict__, "msg": " ".join(f"{name}={value}" for name, value in values.items())}
            )
        return super().format(record)
