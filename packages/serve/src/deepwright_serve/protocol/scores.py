"""Log-probabilities in replies: the chat form, the completions form, and vLLM's for prompts.

All are of the model itself: at temperature 1, before penalties, biases, grammars and truncation.
"""

from __future__ import annotations

from pydantic import BaseModel


class Alternative(BaseModel):
    """A token that could have stood in a place. `bytes` tells what it is where it is not whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Alternative):
    """A token of the answer, and the most probable ones of its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of an answer's content."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Log-probabilities of a completion, one entry a token in each list; with `echo` the prompt's come first.

    The first token of a prompt has none. `text_offset` is where in `text` each token begins, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """vLLM's entry: rank 1 is the most probable token of its place; null: it is none of those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


# One entry a token of the prompt, by token id; null for the first.
PromptLogprobs = list[dict[str, PromptLogprob] | None]
