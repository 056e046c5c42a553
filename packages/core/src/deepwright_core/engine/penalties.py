"""Penalties for tokens that an answer (or its prompt) already holds.

The counts of tokens lie on the device, one row for each sequence that asks, made when the first one does. They follow
`Sequence.tokens`, which the host knows: each step counts the tokens that came since the last. So nothing of a step is
undone when it fails, a preempted sequence is counted anew when it comes back, and rows may move.

Shapes: S counted sequences, P penalised rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .parcel import on_device

if TYPE_CHECKING:
    from .sequence import Sequence

FIRST_ROWS = 8


def penalised(
    logits_PV: Tensor,
    answer_PV: Tensor,
    prompt_PV: Tensor,
    *,
    repetition_P: Tensor,
    presence_P: Tensor,
    frequency_P: Tensor,
) -> Tensor:
    """Logits behind penalties: first repetition (CTRL, Keskar et al. 2019, equation 2, with the sign minded), then
    presence and frequency (OpenAI's).

    answer_PV: int32, how often each token stands in the answer. prompt_PV: bool, whether it stands in the prompt.
    """
    present_PV = answer_PV > 0
    repetition_P1 = repetition_P[:, None]
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where(present_PV | prompt_PV, repeated_PV, logits_PV)
    return logits_PV - presence_P[:, None] * present_PV - frequency_P[:, None] * answer_PV


class TokenCounts:
    """How often each token stands in the answers that asked, and which stand in their prompts."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._answer_SV = torch.zeros(0, vocabulary, dtype=torch.int32, device=device)
        self._prompt_SV = torch.zeros(0, vocabulary, dtype=torch.bool, device=device)
        self._places: dict[int, int] = {}  # request id -> row
        self._counted: dict[int, int] = {}  # request id -> how many of its tokens are counted
        self._free: list[int] = []

    def of(self, sequences: Ordered[Sequence]) -> tuple[Tensor, Tensor]:
        """Counts [P, V] of the answers and presence [P, V] in the prompts. Who is not named is forgotten."""
        present = {sequence.request_id for sequence in sequences}
        for gone in self._places.keys() - present:
            self._free.append(self._places.pop(gone))
            del self._counted[gone]
        new = [sequence for sequence in sequences if sequence.request_id not in self._places]
        if new:
            self._enter(new)
        rows, tokens = [], []
        for sequence in sequences:
            since = sequence.tokens[self._counted[sequence.request_id] :]
            rows += [self._places[sequence.request_id]] * len(since)
            tokens += since
            self._counted[sequence.request_id] = len(sequence.tokens)
        if tokens:
            ones = torch.ones(len(tokens), dtype=torch.int32, device=self._device)
            self._answer_SV.index_put_((self._tensor(rows), self._tensor(tokens)), ones, accumulate=True)
        places_P = self._tensor([self._places[sequence.request_id] for sequence in sequences])
        return self._answer_SV[places_P], self._prompt_SV[places_P]

    def _enter(self, sequences: Ordered[Sequence]) -> None:
        """Give rows to sequences and mark what their prompts hold."""
        while len(self._free) < len(sequences):
            self._grow()
        rows: list[int] = []
        tokens: list[int] = []
        for sequence in sequences:
            row = self._places[sequence.request_id] = self._free.pop()
            self._counted[sequence.request_id] = sequence.prompt_length
            prompt = set(sequence.tokens[: sequence.prompt_length])
            rows += [row] * len(prompt)
            tokens += prompt
        fresh = self._tensor([self._places[sequence.request_id] for sequence in sequences])
        self._answer_SV[fresh] = 0
        self._prompt_SV[fresh] = False
        self._prompt_SV[self._tensor(rows), self._tensor(tokens)] = True

    def _grow(self) -> None:
        rows = len(self._answer_SV)
        more = max(rows, FIRST_ROWS)
        self._answer_SV = torch.cat((self._answer_SV, self._answer_SV.new_zeros(more, self._vocabulary)))
        self._prompt_SV = torch.cat((self._prompt_SV, self._prompt_SV.new_zeros(more, self._vocabulary)))
        self._free += range(rows, rows + more)

    def _tensor(self, values: list[int]) -> Tensor:
        return on_device(values, self._device)
