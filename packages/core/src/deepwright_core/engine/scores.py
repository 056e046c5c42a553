"""How probable the model itself finds tokens: what `logprobs` of a server and evaluation harnesses ask for.

A score is the log-probability at temperature 1, before penalties, biases, grammars and truncation. What a token was
drawn with (`TokenEvent.logprob`) may differ.

Shapes: N places, B rows of a step, X logit rows of them, Q tokens of a chunk or places of a row, V vocabulary, K
alternatives, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .parcel import Parcel, on_device

if TYPE_CHECKING:
    from .sequence import Sequence

MAX_ALTERNATIVES = 1024
"""Scores cross to the host at every step; whole vocabularies are not meant to."""

SLICE_LOGITS = 1 << 25
"""Logits that exist at a time while a prompt is scored: 128 MiB in float32."""


class TokenScore(NamedTuple):
    """A token, its log-probability, and the most probable tokens of its place with theirs, the best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Scored(NamedTuple):
    """Scores on the device."""

    token_N: Tensor  # int64
    logprob_N: Tensor  # float32
    top_NK: Tensor  # int64
    top_logprob_NK: Tensor  # float32


def scored(logits_NV: Tensor, token_N: Tensor, alternatives: int) -> Scored:
    """The score of a token at each place, from the model's own logits."""
    logits_NV = logits_NV.float()
    total_N = logits_NV.logsumexp(-1)
    top_logit_NK, top_NK = logits_NV.topk(min(alternatives, logits_NV.shape[-1]), dim=-1)
    logprob_N = logits_NV.gather(1, token_N[:, None])[:, 0] - total_N
    return Scored(token_N, logprob_N, top_NK, top_logit_NK - total_N[:, None])


class ScoresUnderWay:
    """Scores in a parcel."""

    def __init__(self, parcel: Parcel, scores: Scored) -> None:
        self._places = [parcel.add(tensor) for tensor in scores]

    def read(self, arrays: list[np.ndarray]) -> list[TokenScore]:
        """The scores, from the opened parcel."""
        tokens, logprobs, top, top_logprobs = (arrays[place].tolist() for place in self._places)
        return [
            TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, ids, values in zip(tokens, logprobs, top, top_logprobs, strict=True)
        ]


class AnswerScores:
    """Scores of the tokens that a step draws, at drafted places too, for the rows that ask."""

    def __init__(self, sequences: Ordered[Sequence], logits_XV: Tensor, token_BQ: Tensor, parcel: Parcel) -> None:
        """logits_XV: the model's own, row by row and place by place."""
        rows: dict[int, list[int]] = {}  # how many alternatives -> rows that want so many
        for row, sequence in enumerate(sequences):
            if sequence.params.scores is not None:
                rows.setdefault(sequence.params.scores, []).append(row)
        self._queries = token_BQ.shape[1]
        self._under_way = []
        for alternatives, wanted in rows.items():
            wanted_N = on_device(wanted, token_BQ.device)
            logits_NQV = logits_XV.unflatten(0, token_BQ.shape)[wanted_N]
            scores = scored(logits_NQV.flatten(0, 1), token_BQ[wanted_N].flatten(), alternatives)
            self._under_way.append((wanted, ScoresUnderWay(parcel, scores)))

    def read(self, arrays: list[np.ndarray]) -> dict[int, list[TokenScore]]:
        """Row -> scores, place by place, from the opened parcel."""
        told: dict[int, list[TokenScore]] = {}
        for rows, under_way in self._under_way:
            scores = under_way.read(arrays)
            told |= {row: scores[i * self._queries : (i + 1) * self._queries] for i, row in enumerate(rows)}
        return told


class PromptScores:
    """Scores of the prompts that a step computes, for the sequences that ask: each chunk as it comes."""

    def __init__(self, logits: Callable[[Tensor, Sequence], Tensor], vocabulary: int, parcel: Parcel) -> None:
        """logits: of hidden states of a sequence."""
        self._logits = logits
        self._vocabulary = vocabulary
        self._parcel = parcel
        self._under_way: list[tuple[Sequence, ScoresUnderWay]] = []

    def take(self, sequence: Sequence, start: int, hidden_QD: Tensor) -> None:
        """hidden_QD: of the tokens from `start` on; each tells about the token behind it."""
        alternatives = sequence.params.prompt_scores
        if alternatives is None or sequence.logprobs:  # after a preemption they are known
            return
        if start == 0:
            sequence.prompt_scores = []
        tokens = sequence.tokens[start + 1 : min(start + 1 + len(hidden_QD), sequence.prompt_length)]
        if tokens:
            token_N = on_device(tokens, hidden_QD.device)
            scores = self._scored(sequence, hidden_QD[: len(tokens)], token_N, alternatives)
            self._under_way.append((sequence, ScoresUnderWay(self._parcel, scores)))

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def arrive(self, arrays: list[np.ndarray]) -> None:
        """Give the sequences theirs, from the opened parcel."""
        for sequence, scores in self._under_way:
            sequence.prompt_scores += scores.read(arrays)

    def _scored(self, sequence: Sequence, hidden_ND: Tensor, token_N: Tensor, alternatives: int) -> Scored:
        """Only so many states at a time become logits that these stay small."""
        length = max(1, SLICE_LOGITS // self._vocabulary)
        parts = [
            scored(self._logits(hidden, sequence), token, alternatives)
            for hidden, token in zip(hidden_ND.split(length), token_N.split(length), strict=True)
        ]
        return Scored(*map(torch.cat, zip(*parts, strict=True)))
