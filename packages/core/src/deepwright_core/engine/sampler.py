"""Draws tokens: vectorised over the batch, and independent of it.

Randomness is a counter, not a state: the uniform number for a token is a hash of its request's seed and its position,
and the token is where the cumulated probabilities, in the order of the vocabulary, pass that number. So a request
draws the same tokens whatever runs beside it, after a preemption, and on every device whose logits agree.
Left out: penalties, logit bias and grammars (they change the logits before they come here).

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sequence import GREEDY_BELOW

UNIFORM_BITS = 52
"""One bit less than a float64 holds: u * total then rounds to less than total, so no draw falls off the end."""


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# The increment and multipliers of SplitMix64 (Steele, Lea & Flood 2014); int64 products wrap as its uint64 do.
GAMMA = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >>> bits): torch's >> on int64 carries the sign down, which the mask takes away."""
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: every bit of x changes half of the bits of the result."""
    x = _shifted(x, 30) * MULTIPLIERS[0]
    x = _shifted(x, 27) * MULTIPLIERS[1]
    return _shifted(x, 31)


def uniform(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """A float64 in [0, 1) for each pair of int64 seed and position, the same on every device."""
    # The seed is hashed before the position is added, or seed s at position p + 1 would be seed s + 1 at position p.
    bits_B = _mixed(_mixed(seed_B * GAMMA + GAMMA) + position_B * GAMMA)
    return ((bits_B >> (64 - UNIFORM_BITS)) & ((1 << UNIFORM_BITS) - 1)).double() * 2.0**-UNIFORM_BITS


@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of a batch, one tensor a parameter."""

    temperature_B: Tensor  # float32
    top_p_B: Tensor  # float32
    min_p_B: Tensor  # float32
    top_k_B: Tensor  # int64
    seed_B: Tensor  # int64

    def first(self, count: int) -> SamplingRows:
        """Views of the first rows."""
        return SamplingRows(
            self.temperature_B[:count],
            self.top_p_B[:count],
            self.min_p_B[:count],
            self.top_k_B[:count],
            self.seed_B[:count],
        )

    def repeated(self, times: int) -> SamplingRows:
        """Each row `times` times, one after the other."""
        columns = (self.temperature_B, self.top_p_B, self.min_p_B, self.top_k_B, self.seed_B)
        return SamplingRows(*(column.repeat_interleave(times) for column in columns))


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
    logits_BV = logits_BV.float()
    best_B1 = logits_BV.argmax(-1, keepdim=True)
    scaled_BV = logits_BV - logits_BV.gather(1, best_B1)  # first, so that no temperature is too small
    if not any_random:
        return best_B1[:, 0], -scaled_BV.double().exp().sum(-1).log()

    greedy_B = rows.temperature_B < GREEDY_BELOW
    scaled_BV = scaled_BV / torch.where(greedy_B, 1.0, rows.temperature_B)[:, None]
    weights_BV = scaled_BV.double().exp()
    if any_truncated:
        weights_BV = weights_BV.masked_fill(~(kept(scaled_BV, rows) | greedy_B[:, None]), 0.0)
    cumulated_BV = weights_BV.cumsum(-1)
    total_B1 = cumulated_BV[:, -1:].contiguous()
    threshold_B1 = uniform(rows.seed_B, position_B)[:, None] * total_B1
    drawn_B1 = torch.searchsorted(cumulated_BV, threshold_B1, right=True)
    # Only logits that are not numbers lead past the end; the log-probability then says so.
    token_B1 = torch.where(greedy_B[:, None], best_B1, drawn_B1.clamp(max=logits_BV.shape[-1] - 1))
    return token_B1[:, 0], (scaled_BV.gather(1, token_B1).double() - total_B1.log())[:, 0]
