"""What is known of one request: who sent it, how long each part took, what it used, and how it ended.

The edge makes a record for every request; a generation adds its answers. Metrics, the log line and plugins read it.
What was asked and answered hangs on it for plugins only; metrics and the log read numbers and names.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from deepwright_core.engine import TokenEvent
from deepwright_core.events import RequestEvent

from .answer import Answer
from .metrics import Metrics, ModelMeters
from .tenants import Tenant

ABORTED = "abort"
FAILED = "error"


@dataclass
class AnswerRecord:
    """One answer on its way. Times are seconds of `time.monotonic`; None: not yet."""

    prompt_tokens: int
    submitted: float
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    cached_tokens: int = 0
    tokens: int = 0
    finish_reason: str = ABORTED

    def token(self, event: TokenEvent, now: float) -> float | None:
        """Take one token; the seconds since the one before it, or None for the first."""
        if event.admitted_at:
            self.admitted = event.admitted_at
        self.cached_tokens = event.cached_tokens
        self.tokens += 1
        gap = None if self.last is None else now - self.last
        self.first = now if self.first is None else self.first
        self.last = now
        return gap

    @property
    def queue_seconds(self) -> float | None:
        """From submission to the first place in the cache."""
        return None if self.admitted is None else max(self.admitted - self.submitted, 0.0)

    @property
    def first_token_seconds(self) -> float | None:
        """From submission to the first token."""
        return None if self.first is None else self.first - self.submitted


@dataclass
class RequestRecord:
    """One request. `began` is of `time.monotonic`, `at` of `time.time`; status 0: not answered yet.

    `path` is the route's ("/v1/models/{name}"), "other" where there is none: it must not grow without bound.
    """

    request_id: str
    method: str
    metrics: Metrics
    tenant: Tenant = field(default_factory=Tenant)
    began: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)
    path: str = "other"
    status: int = 0
    seconds: float = 0.0
    error: str = ""
    model: str = ""
    answers: list[AnswerRecord] = field(default_factory=list)
    asked: BaseModel | None = field(default=None, repr=False)
    said: Sequence[Answer] = field(default=(), repr=False)
    _meters: ModelMeters | None = None

    def begin(self, model: str, prompts: Sequence[Sequence[int]]) -> None:
        """Answers to these prompts are asked of a model."""
        self.model = model
        self._meters = self.metrics.of(model)
        now = time.monotonic()
        self.answers = [AnswerRecord(len(prompt), now) for prompt in prompts]

    def token(self, index: int, event: TokenEvent) -> None:
        """An answer got a token."""
        answer = self.answers[index]
        gap = answer.token(event, time.monotonic())
        self.tenant.use(1)
        if self._meters is None:
            return
        if gap is None:
            self._meters.began(answer)
        else:
            self._meters.gap.observe(gap)

    def finished(self, index: int, reason: str) -> None:
        """An answer has ended; only its first end counts."""
        answer = self.answers[index]
        if answer.ended is None:
            answer.ended = time.monotonic()
            answer.finish_reason = reason
            if self._meters is not None:
                self._meters.finished(answer)

    @property
    def prompt_tokens(self) -> int:
        """Of the answers together; a prompt that several of them share counts once for each."""
        return sum(answer.prompt_tokens for answer in self.answers)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, those that the prefix cache had."""
        return sum(answer.cached_tokens for answer in self.answers)

    @property
    def completion_tokens(self) -> int:
        """Of the answers together."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def reasoning_tokens(self) -> int:
        """Of the answers' tokens, those that were thinking."""
        return sum(answer.reasoning_tokens for answer in self.said)

    @property
    def queue_seconds(self) -> float | None:
        """The longest that one of the answers waited for its place."""
        return max((a.queue_seconds for a in self.answers if a.queue_seconds is not None), default=None)

    @property
    def first_token_seconds(self) -> float | None:
        """To the first token of any answer."""
        return min((a.first_token_seconds for a in self.answers if a.first_token_seconds is not None), default=None)

    def event(self) -> RequestEvent:
        """The record as plugins get it."""
        return RequestEvent(
            request_id=self.request_id,
            path=self.path,
            model=self.model,
            tenant=self.tenant.name,
            status=self.status,
            error=self.error,
            started=self.at,
            seconds=self.seconds,
            queue_seconds=self.queue_seconds,
            first_token_seconds=self.first_token_seconds,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            reasoning_tokens=self.reasoning_tokens,
            finish_reasons=tuple(answer.finish_reason for answer in self.answers),
            request={} if self.asked is None else self.asked.model_dump(mode="json", exclude_none=True),
            answers=tuple({"content": answer.content, "reasoning": answer.reasoning} for answer in self.said),
        )
