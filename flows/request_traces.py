"""Requests to a server as MLflow traces: what was asked, what was said, and where the time went.

    deepwright serve deepwright@champion --trace-to http://127.0.0.1:5000 --trace-share 0.01

A trace holds the text of the conversation, so it is off until somebody asks for it, and takes the share of requests
that was asked for. Which requests are taken follows from their ids: of several servers, each takes the same share.
Left out: feedback and evaluation, which are MLflow's own once the traces are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import mlflow
from mlflow.entities import SpanType

from deepwright_core.errors import RequestError
from deepwright_core.events import RequestEvent
from deepwright_core.hookspecs import hookimpl

from .mlflow_tracker import experiment_in

EXPERIMENT = "deepwright-requests"


def taken(request_id: str, share: float) -> bool:
    """Whether a request is among the share that is traced."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class RequestTraces:
    """A plugin that writes each taken request as one trace of the experiment `deepwright-requests`."""

    def __init__(self, uri: str, share: float) -> None:
        if not 0 < share <= 1:
            raise RequestError(f"--trace-share is {share:g}; expected a number above 0 and at most 1 (every request).")
        self._share = share
        mlflow.set_tracking_uri(uri)
        try:
            self._experiment = experiment_in(mlflow.MlflowClient(uri), EXPERIMENT)
        except Exception as error:
            raise RequestError(f"--trace-to is '{uri}'; MLflow cannot be used there: {error}.") from error

    @hookimpl
    def deepwright_request_done(self, event: RequestEvent) -> None:
        """Write the trace."""
        if not taken(event.request_id, self._share):
            return
        trace = mlflow.start_span_no_context(
            event.path,
            span_type=SpanType.CHAT_MODEL,
            inputs=dict(event.request),
            attributes=_attributes(event),
            experiment_id=self._experiment,
            start_time_ns=_nanoseconds(event, 0.0),
        )
        for name, begins, ends in _parts(event):
            part = mlflow.start_span_no_context(name, parent_span=trace, start_time_ns=_nanoseconds(event, begins))
            part.end(end_time_ns=_nanoseconds(event, ends))
        if event.error:
            trace.set_status("ERROR")
        trace.set_outputs([dict(answer) for answer in event.answers])
        trace.end(end_time_ns=_nanoseconds(event, event.seconds))


def _nanoseconds(event: RequestEvent, seconds: float) -> int:
    """A moment of a request, as MLflow counts time."""
    return round(event.started * 1e9) + round(seconds * 1e9)


def _parts(event: RequestEvent) -> Iterator[tuple[str, float, float]]:
    """Waiting, prompt and answer, as far as they came: name, begin and end in seconds from the request's start."""
    queue, first = event.queue_seconds, event.first_token_seconds
    if queue is not None and first is not None:
        yield "waiting", 0.0, queue
        yield "prompt", queue, first
        yield "answer", first, event.seconds


def _attributes(event: RequestEvent) -> dict[str, Any]:
    """Numbers and names; token counts also under MLflow's own name, which its pages add up."""
    return {
        "request_id": event.request_id,
        "model": event.model,
        "tenant": event.tenant,
        "status": event.status,
        "error": event.error,
        "finish_reasons": list(event.finish_reasons),
        "cached_tokens": event.cached_tokens,
        "reasoning_tokens": event.reasoning_tokens,
        "mlflow.chat.tokenUsage": {
            "input_tokens": event.prompt_tokens,
            "output_tokens": event.completion_tokens,
            "total_tokens": event.prompt_tokens + event.completion_tokens,
        },
    }
