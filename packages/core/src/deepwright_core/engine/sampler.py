"""Draws tokens: vectorised over the batch, and independent of it.

Randomness is a counter, not a state: a token is drawn by a race whose numbers are hashes of the request's seed, the
position and the tokens (`token_race`). So a request draws the same tokens whatever runs beside it, after a preemption,
and on every device whose logits agree. And two distributions that are nearly the same mostly draw the same token, which
is what `speculation` lives on (inverting one cumulated distribution with one number would shift all later tokens
whenever an early one gains a little).
Left out: penalties, logit bias and grammars (they change the logits before they come here).

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepwright_kernels import token_race

from .sequence import GREEDY_BELOW


@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of a batch, one tensor a parameter."""

    temperature_B: Tensor  # float32
    top_p_B: Tensor  # float32
    min_p_B: Tensor  # float32
    top_k_B: Tensor  # int64
    seed_B: Tensor  # int64

    def columns(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        return self.temperature_B, self.top_p_B, self.min_p_B, self.top_k_B, self.seed_B

    def first(self, count: int) -> SamplingRows:
        """Views of the first rows."""
        return SamplingRows(*(column[:count] for column in self.columns()))

    def repeated(self, times: int) -> SamplingRows:
        """Each row `times` times, one after the other."""
        return SamplingRows(*(column.repeat_interleave(times) for column in self.columns()))


def kept(scaled_BV: Tensor, rows: SamplingRows) -> Tensor:
    """Which tokens truncation leaves, as bool [B, V].

    top_k keeps exactly k tokens (ties go to the lower id); top_p keeps the shortest beginning of what is left whose
    probability reaches p; min_p keeps what is at least that share of the most probable token. Each keeps at least one.
    """
    vocabulary = scaled_BV.shape[-1]
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    weights_BV = (sorted_BV - sorted_BV[:, :1]).double().exp()  # relative to the most probable token
    top_k_B1 = torch.where(rows.top_k_B > 0, rows.top_k_B, vocabulary)[:, None]
    keep_BV = torch.arange(vocabulary, device=scaled_BV.device) < top_k_B1
    weights_BV = weights_BV.masked_fill(~keep_BV, 0.0)
    cumulated_BV = weights_BV.cumsum(-1)
    before_BV = cumulated_BV - weights_BV
    # Rounding must not let top_p = 1 cut the tail off.
    top_p_B1 = torch.where(rows.top_p_B < 1, rows.top_p_B, float("inf"))[:, None]
    keep_BV &= before_BV < top_p_B1 * cumulated_BV[:, -1:]
    keep_BV &= weights_BV >= rows.min_p_B[:, None]
    keep_BV[:, 0] = True
    return torch.zeros_like(keep_BV).scatter_(1, order_BV, keep_BV)


def sample(
    logits_BV: Tensor, rows: SamplingRows, position_B: Tensor, *, any_random: bool, any_truncated: bool
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: (int64 ids, float64 log-probabilities under the distribution drawn from).

    any_random, any_truncated: whether some row needs it. The caller knows that on the host; asking the tensors would
    make the host wait. A row's result does not depend on them as long as they are true when it needs them.
    """
    temperature_B = rows.temperature_B
    if any_truncated:
        scaled_BV = logits_BV.float()
        scaled_BV = scaled_BV - scaled_BV.amax(-1, keepdim=True)  # first, so that no temperature is too small
        greedy_B = temperature_B < GREEDY_BELOW
        scaled_BV /= torch.where(greedy_B, 1.0, temperature_B)[:, None]
        logits_BV = scaled_BV.masked_fill_(~(kept(scaled_BV, rows) | greedy_B[:, None]), -torch.inf)
        temperature_B = torch.where(greedy_B, 0.0, 1.0)
    return token_race(logits_BV, temperature_B, rows.seed_B, position_B, GREEDY_BELOW, any_random)
