"""What is asked of the engine, what it answers, and the sequence that grows in between.

A `Sequence` knows its tokens and nothing of tensors; the block manager tells it which blocks are its own.
Left out: text. Stop strings, templates and detokenising belong to whoever owns a tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import RequestError

FinishReason = Literal["stop", "length", "cancelled"]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them only makes infinities of what is already an argmax."""


@dataclass(frozen=True)
class SamplingParams:
    """How to draw the tokens of one request.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. Truncation is applied after temperature, in the
    order top_k, top_p (of what top_k left), min_p. `stop_ids` end the completion, as the end-of-text ids do unless
    `ignore_eos`.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, all of them at once."""
        problems = []
        if self.max_tokens < 1:
            problems.append(f"max_tokens is {self.max_tokens}; expected at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature}; expected a finite number from 0 (greedy) upwards.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; expected a number above 0 and at most 1 (1 turns it off).")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}; expected 0 (off) or a positive count of tokens.")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p is {self.min_p}; expected a number from 0 (off) to 1.")
        if problems:
            raise RequestError(problems)

    @property
    def greedy(self) -> bool:
        """Whether every token is the most probable one."""
        return self.temperature < GREEDY_BELOW

    @property
    def truncated(self) -> bool:
        """Whether sampling leaves tokens out (greedy never does: its one token is always among the rest)."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class TokenEvent(NamedTuple):
    """One token of one request. A cancelled request gets a last event whose `token_id` is None.

    cached_tokens: how many tokens of the prompt were found in the prefix cache.
    """

    request_id: int
    token_id: int | None
    logprob: float
    finish_reason: FinishReason | None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """A finished request. `token_ids` ends in the stop token when there was one.

    logprobs: log-probability of each token under the distribution that it was drawn from (temperature and truncation
    applied); of a greedy request under the plain softmax.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    cached_tokens: int = 0


class Sequence:
    """A request on its way: prompt and generated tokens, and how far they have come.

    Its life is waiting -> prefilling -> decoding -> finished; preemption and failure lead back to waiting.
    While it prefills, `computed` counts the tokens whose cache is written (or will be by the step just planned);
    while it decodes, that is every token but the last.
    """

    __slots__ = (
        "admitted_before",
        "blocks",
        "cached_tokens",
        "computed",
        "decoding",
        "digests",
        "limit",
        "logprobs",
        "params",
        "prompt_length",
        "published",
        "request_id",
        "row",
        "salt",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        limit: int,
        stop_ids: frozenset[int],
        salt: str,
    ) -> None:
        self.request_id = request_id
        self.tokens = prompt
        self.prompt_length = len(prompt)
        self.logprobs: list[float] = []
        self.params = params
        self.limit = limit  # length in tokens at which it ends with "length"
        self.stop_ids = stop_ids
        self.salt = salt
        self.blocks: list[int] = []
        self.digests: list[bytes] = []  # of its full blocks, as far as they were needed
        self.published = 0  # how many of its blocks were offered to the prefix cache
        self.computed = 0
        self.decoding = False
        self.admitted_before = False
        self.cached_tokens = 0
        self.row = -1  # where the runner keeps it

    def __len__(self) -> int:
        return len(self.tokens)
