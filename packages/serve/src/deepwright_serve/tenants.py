"""Who may ask how much: a tenant (the holder of one key), its rates, and its answers at the same time.

Rates are token buckets that hold a minute's worth and refill evenly. Requests are paid when they come. Tokens are paid
as they are used, so a request is let in while anything is left and may end in debt, which the next ones wait for: the
average is exact, and nobody has to guess the length of an answer beforehand.
Left out: limits across several servers (each counts for itself), and limits of a model (they belong to a tenant).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .refusal import Refusal

Clock = Callable[[], float]


class Bucket:
    """An allowance of `per_minute` units a minute."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What is left now; negative: debt."""
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self.per_minute / 60, float(self.per_minute))
        self._at = now
        return self._level

    def spend(self, amount: float) -> None:
        """Take some, even what is not there."""
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        """How long until that much is left."""
        return max(level - self.level, 0.0) * 60 / self.per_minute


@dataclass(frozen=True)
class Allowance:
    """What a key may use; None: as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


@dataclass(eq=False)
class Tenant:
    """The holder of a key. `salt` keeps its cached prefixes and its place in the queue apart from others'.

    `name` is what logs call it; without keys there is one tenant, which has neither name nor salt.
    """

    name: str = ""
    salt: str = ""
    allowance: Allowance = Allowance()
    clock: Clock = time.monotonic
    open: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.change(self.allowance)

    def change(self, allowance: Allowance) -> None:
        """Other limits from now on; full buckets, but what is open stays counted."""
        self.allowance = allowance
        requests, tokens = allowance.requests_per_minute, allowance.tokens_per_minute
        self._requests = None if requests is None else Bucket(requests, self.clock)
        self._tokens = None if tokens is None else Bucket(tokens, self.clock)

    def knock(self) -> None:
        """Pay for one request, of whatever kind; `Refusal` 429 when there were too many."""
        if self._requests is None:
            return
        if self._requests.level < 1:
            raise self._too_many("requests", self._requests, 1)
        self._requests.spend(1)

    def enter(self, answers: int, prompt_tokens: int) -> None:
        """Begin some answers, and pay for their prompts; `leave` ends them. `Refusal` 429 when it is too much."""
        most = self.allowance.concurrent
        if most is not None and answers > most:
            raise Refusal(
                400, f"The request asks for {answers} answers; this key may have {most} at the same time.",
                code="too_many_answers",
            )  # fmt: skip
        if most is not None and self.open + answers > most:
            raise Refusal(
                429,
                f"{self.open} answers are being generated for this key and {answers} more were asked for; it may have "
                f"{most} at the same time. Wait for one to end.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        if self._tokens is not None and self._tokens.level <= 0:
            raise self._too_many("tokens", self._tokens, 1)
        self.open += answers
        self.use(prompt_tokens)

    def use(self, tokens: int) -> None:
        """Pay for tokens."""
        if self._tokens is not None:
            self._tokens.spend(tokens)

    def leave(self, answers: int) -> None:
        """As many answers are over."""
        self.open -= answers

    def headers(self) -> dict[str, str]:
        """Where the tenant stands, in OpenAI's headers."""
        told = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                told[f"x-ratelimit-remaining-{kind}"] = str(max(int(bucket.level), 0))
                told[f"x-ratelimit-reset-{kind}"] = _duration(bucket.seconds_until(bucket.per_minute))
        return told

    @staticmethod
    def _too_many(kind: str, bucket: Bucket, level: float) -> Refusal:
        seconds = max(math.ceil(bucket.seconds_until(level)), 1)
        return Refusal(
            429,
            f"This key may use {bucket.per_minute} {kind} a minute and has used them; try again in {seconds} s.",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(seconds)},
        )


def _duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: 20ms, 7s, 1m5s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
