"""Does to a batch's draw what single rows ask: penalties, biases, bans, masks of grammars, forced tokens.

    step = controls.of(sequences)              # None when no row asks anything: then nothing of this runs
    token_B, ... = sample(step.adjust(logits_BV), ...)
    token_B, logprob_B, forced_B = step.settle(token_B, logprob_B)

Everything that a draw needs is known to the host beforehand, so the device is given some small tensors and asked
nothing. Changes come in one order: penalties, biases and bans, grammars; then temperature and truncation (`sampler`).

Shapes: B rows, X logit rows of them, V vocabulary, G rows with a grammar, W words of its mask, E replaced tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import numpy as np
import torch
from torch import Tensor

from .grammar import WORD_BITS
from .parcel import on_device
from .penalties import TokenCounts, penalised
from .rules import FREE
from .sequence import Sequence


class Controls:
    """Makes the controls of each step."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.device = device
        self.counts = TokenCounts(vocabulary, device)

    def of(self, sequences: Ordered[Sequence]) -> StepControls | None:
        """What the rows of a step ask of their next draw."""
        asking = [(row, sequence) for row, sequence in enumerate(sequences) if sequence.controlled]
        return StepControls(self, asking) if asking else None


class StepControls:
    """What the rows of one step ask of their draws."""

    def __init__(self, controls: Controls, asking: Ordered[tuple[int, Sequence]]) -> None:
        self._controls = controls
        self._device = controls.device
        self._penalised = [(row, sequence) for row, sequence in asking if sequence.params.penalised]
        added: list[tuple[int, int, float]] = []
        biased: list[tuple[int, int, float]] = []
        masks: list[tuple[int, np.ndarray]] = []
        self._forced: list[tuple[int, int]] = []
        self._replaced: list[tuple[int, int, frozenset[int]]] = []
        for row, sequence in asking:
            bounds = sequence.rules.bounds() if sequence.rules is not None else FREE
            added += [(row, token, -np.inf) for token in bounds.banned if token < controls.vocabulary]
            biased += [(row, token, bias) for token, bias in sequence.params.logit_bias]
            biased += [(row, token, -np.inf) for token in bounds.banned_for_good if token < controls.vocabulary]
            if bounds.forced is not None:
                self._forced.append((row, bounds.forced))
            if bounds.instead is not None:
                self._replaced.append((row, bounds.instead, bounds.replaced))
            if bounds.allowed_W is not None:
                masks.append((row, bounds.allowed_W))
        self._added, self._biased = added, biased
        self._masks = masks

    def adjust(self, logits_XV: Tensor, stride: int = 1) -> Tensor:
        """float32 logits as they are to be drawn from; what came in stays as it is.

        Row b's are at b · stride. Those between are of drafts: what stays the same to the answer's end holds there
        too, while what hangs on the tokens before lets no drafts through.
        """
        if not (self._penalised or self._added or self._biased or self._masks):
            return logits_XV
        logits_XV = logits_XV.float().clone()
        if self._penalised:
            rows = self._tensor([row * stride for row, _ in self._penalised])
            params = [sequence.params for _, sequence in self._penalised]
            answer_PV, prompt_PV = self._controls.counts.of([sequence for _, sequence in self._penalised])
            logits_XV[rows] = penalised(
                logits_XV[rows],
                answer_PV,
                prompt_PV,
                repetition_P=self._floats([p.repetition_penalty for p in params]),
                presence_P=self._floats([p.presence_penalty for p in params]),
                frequency_P=self._floats([p.frequency_penalty for p in params]),
            )
        added = [(row * stride, token, value) for row, token, value in self._added]
        added += [(row * stride + i, token, value) for row, token, value in self._biased for i in range(stride)]
        if added:
            at, tokens, values = zip(*added, strict=True)
            places = (self._tensor(at), self._tensor(tokens))
            logits_XV.index_put_(places, self._floats(values), accumulate=True)
        if self._masks:
            rows = self._tensor([row * stride for row, _ in self._masks])
            logits_XV[rows] = logits_XV[rows].masked_fill(~self._allowed(), -torch.inf)
        return logits_XV

    def settle(self, token_B: Tensor, logprob_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens and log-probabilities with the forced ones in their places (0 is theirs), and which those are; None:
        there can be none."""
        if not (self._forced or self._replaced):
            return token_B, logprob_B, None
        forced_B = torch.zeros_like(token_B, dtype=torch.bool)
        token_B = token_B.clone()
        if self._replaced:
            asking, instead, replaced = zip(*self._replaced, strict=True)
            widest = max(map(len, replaced))
            rows_R = self._tensor(asking)
            ends_RE = self._tensor([[*ends, *[-1] * (widest - len(ends))] for ends in replaced])
            hit_R = (token_B[rows_R, None] == ends_RE).any(1)
            token_B[rows_R] = torch.where(hit_R, self._tensor(instead), token_B[rows_R])
            forced_B[rows_R] = hit_R
        if self._forced:
            rows_R = self._tensor([row for row, _ in self._forced])
            token_B[rows_R] = self._tensor([token for _, token in self._forced])
            forced_B[rows_R] = True
        return token_B, logprob_B.masked_fill(forced_B, 0.0), forced_B

    def _allowed(self) -> Tensor:
        """The grammars' masks as bool [G, V]. Tokens that a mask does not reach cannot be drawn."""
        vocabulary = self._controls.vocabulary
        words_GW = np.zeros((len(self._masks), -(-vocabulary // WORD_BITS)), dtype=np.int32)
        for index, (_, allowed_W) in enumerate(self._masks):
            count = min(len(allowed_W), words_GW.shape[1])
            words_GW[index, :count] = allowed_W[:count]
        bits = torch.arange(WORD_BITS, dtype=torch.int32, device=self._device)
        words = on_device(words_GW, self._device, np.int32)
        return ((words[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocabulary]

    def _tensor(self, values: object) -> Tensor:
        return on_device(values, self._device)

    def _floats(self, values: object) -> Tensor:
        return on_device(values, self._device, np.float32)
