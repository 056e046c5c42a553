"""How probable the model itself finds tokens: what `logprobs` of a server and evaluation harnesses ask for.

A score is the log-probability at temperature 1, before penalties, biases, grammars and truncation. What a token was
drawn with (`TokenEvent.logprob`) may differ.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_ALTERNATIVES = 1024
"""Scores cross to the host at every step; whole vocabularies are not meant to."""


class TokenScore(NamedTuple):
    """A token, its log-probability, and the most probable tokens of its place with theirs, the best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
