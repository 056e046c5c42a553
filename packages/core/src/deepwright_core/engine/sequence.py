"""What is asked of the engine, what it answers, and the sequence that grows in between.

A `Sequence` knows its tokens and nothing of tensors; the block manager tells it which blocks are its own.
Left out: text. Stop strings, templates and detokenising belong to whoever owns a tokenizer.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from deepwright_kernels.draw_tokens import GREEDY_BELOW

from ..errors import RequestError
from .grammar import Grammar
from .rules import Rules
from .scores import MAX_ALTERNATIVES, TokenScore
from .thinking import ThinkingControl

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How to draw the tokens of one request.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. Truncation is applied after temperature, in the
    order top_k, top_p (of what top_k left), min_p. `stop_ids` end the completion, as the end-of-text ids do unless
    `ignore_eos`; before `min_tokens` tokens none of them can be drawn.

    Before temperature, logits change in this order. repetition_penalty θ divides the positive and multiplies the
    negative logits of tokens that stand in the prompt or the answer (Keskar et al. 2019, CTRL; 1 is off).
    presence_penalty is subtracted from the logits of tokens that stand in the answer, frequency_penalty as many times
    as they do (OpenAI's definition; 0 is off). logit_bias is added: pairs of token and bias.

    scores: None, or how many alternatives come with each token's score. prompt_scores: the same for each token of the
    prompt but the first; such a request computes its prompt itself instead of taking it from the prefix cache.
    thinking, grammar: see there; with both, the grammar begins when thinking has ended.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    scores: int | None = None
    prompt_scores: int | None = None
    thinking: ThinkingControl | None = None
    grammar: Grammar | None = None

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
        if not 0 <= self.min_tokens <= self.max_tokens:
            problems.append(f"min_tokens is {self.min_tokens}; expected 0 to max_tokens, which is {self.max_tokens}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                problems.append(f"{name} is {getattr(self, name)}; expected a number from -2 to 2 (0 turns it off).")
        if not 0 < self.repetition_penalty <= 100:
            problems.append(
                f"repetition_penalty is {self.repetition_penalty}; expected a number above 0 and at most 100 (1 turns "
                "it off)."
            )
        biased = [token for token, _ in self.logit_bias]
        problems += [
            f"logit_bias gives token {token} {bias}; expected tokens from 0 and a number from -100 to 100."
            for token, bias in self.logit_bias
            if token < 0 or not -100 <= bias <= 100
        ]
        twice = sorted(token for token, count in Counter(biased).items() if count > 1)
        if twice:
            problems.append(f"logit_bias names tokens {twice} more than once; expected one bias a token.")
        for name in ("scores", "prompt_scores"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_ALTERNATIVES:
                problems.append(f"{name} is {count}; expected None or 0 to {MAX_ALTERNATIVES} alternatives.")
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

    @property
    def penalised(self) -> bool:
        """Whether tokens that were there before are less (or more) probable."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def named_tokens(self) -> list[tuple[str, int]]:
        """Tokens that an answer is to hold or whose logits change, each with the field that names it."""
        named = [("logit_bias", token) for token, _ in self.logit_bias]
        return named + ([] if self.thinking is None else self.thinking.named_tokens)

    @property
    def ruled(self) -> bool:
        """Whether what may come next hangs on the answer so far."""
        return self.min_tokens > 0 or self.thinking is not None or self.grammar is not None


class Drawn(NamedTuple):
    """A token that the runner drew for a sequence. forced: thinking control put it there; its logprob is 0."""

    token_id: int
    logprob: float
    forced: bool = False
    score: TokenScore | None = None


class TokenEvent(NamedTuple):
    """One token of one request; a step may give a request several.

    A cancelled request gets a last event whose `token_id` is None.
    cached_tokens: how many tokens of the prompt were found in the prefix cache. score: when `SamplingParams.scores`
    asks. prompt_scores: when that asks, on the request's first event; one for each token of the prompt but the first.
    forced: the token was put there by thinking control (its logprob is 0); a policy that learns must leave it out.
    admitted_at: when the request first got its place in the cache, in seconds of `time.monotonic`.
    """

    request_id: int
    token_id: int | None
    logprob: float
    finish_reason: FinishReason | None
    cached_tokens: int = 0
    score: TokenScore | None = None
    prompt_scores: tuple[TokenScore, ...] | None = None
    forced: bool = False
    admitted_at: float = 0.0


@dataclass(frozen=True)
class Completion:
    """A finished request. `token_ids` ends in the stop token when there was one.

    logprobs: log-probability of each token under the distribution that it was drawn from (temperature, truncation and
    whatever else was asked for applied); of a greedy request at temperature 1. scores, prompt_scores: as in
    `TokenEvent`; scores is empty when none were asked for. forced: which of token_ids thinking control put there;
    empty when none was.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    cached_tokens: int = 0
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: tuple[TokenScore, ...] | None = None
    forced: list[bool] = field(default_factory=list)


class Sequence:
    """A request on its way: prompt and generated tokens, and how far they have come.

    Its life is waiting -> prefilling -> decoding -> finished; preemption and failure lead back to waiting.
    While it prefills, `computed` counts the tokens whose cache is written (or will be by the step just planned);
    while it decodes, that is every token but the last.
    """

    __slots__ = (
        "adapter",
        "admitted_at",
        "blocks",
        "cached_tokens",
        "computed",
        "controlled",
        "decoding",
        "digests",
        "forced",
        "limit",
        "logprobs",
        "params",
        "prompt_length",
        "prompt_scores",
        "published",
        "request_id",
        "row",
        "rules",
        "salt",
        "scores",
        "speculative",
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
        adapter: int,
    ) -> None:
        self.request_id = request_id
        self.tokens = prompt
        self.prompt_length = len(prompt)
        self.logprobs: list[float] = []
        self.forced: list[bool] = []
        self.scores: list[TokenScore] = []
        self.prompt_scores: list[TokenScore] = []
        self.params = params
        self.rules = Rules(params, stop_ids) if params.ruled else None
        self.speculative = not params.penalised  # else what is drawn behind a draft hangs on it
        self.controlled = params.ruled or params.penalised or bool(params.logit_bias)
        self.limit = limit  # length in tokens at which it ends with "length"
        self.stop_ids = stop_ids
        self.salt = salt
        self.adapter = adapter  # its number, 0 for none
        self.blocks: list[int] = []
        self.digests: list[bytes] = []  # of its full blocks, as far as they were needed
        self.published = 0  # how many of its blocks were offered to the prefix cache
        self.computed = 0
        self.decoding = False
        self.admitted_at = 0.0  # seconds of time.monotonic, once it was
        self.cached_tokens = 0
        self.row = -1  # where the runner keeps it

    def __len__(self) -> int:
        return len(self.tokens)

    def room(self, block_size: int) -> int:
        """Drafted tokens are of use at positions below this: they have a slot, and a token may follow them, which is
        drawn freely."""
        if not self.speculative:
            return 0
        room = min(len(self.blocks) * block_size, self.limit - 1)
        return room if self.rules is None else int(min(room, len(self.tokens) + max(0, self.rules.free_draws - 1)))

    def foreseen(self, draws: int) -> bool:
        """Whether the host can say how the next so many tokens are drawn before it has read any of them."""
        return not self.params.penalised and (self.rules is None or self.rules.free_draws >= draws)

    @property
    def told_prompt_scores(self) -> tuple[TokenScore, ...] | None:
        """The scores of its prompt, once that is computed; None when they were not asked for."""
        return None if self.params.prompt_scores is None else tuple(self.prompt_scores)

    def append(self, drawn: Drawn) -> FinishReason | None:
        """Take the next token; why the sequence ends with it, or None."""
        self.tokens.append(drawn.token_id)
        self.logprobs.append(drawn.logprob)
        self.forced.append(drawn.forced)
        if drawn.score is not None:
            self.scores.append(drawn.score)
        reason = self.rules.take(drawn.token_id, drawn.forced) if self.rules is not None else None
        if drawn.token_id in self.stop_ids:
            return "stop"
        if reason is not None:
            return reason
        return "length" if len(self.tokens) >= self.limit else None
