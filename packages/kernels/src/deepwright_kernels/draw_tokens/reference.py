"""Drawing tokens in plain torch: what truncation leaves is found by sorting the vocabulary.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import GREEDY_BELOW


def _signed(value: int, bits: int = 64) -> int:
    """The signed integer with the same bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


# The increment and multipliers of SplitMix64 (Steele, Lea & Flood 2014); int64 products wrap as its uint64 do.
GAMMA = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
# For 32 bits: the golden ratio again, and a finalizer of the same form (Ellis 2018, "Prospecting for hash functions").
GAMMA_32 = _signed(0x9E3779B9, 32)
MULTIPLIERS_32 = (_signed(0x7FEB352D, 32), _signed(0x846CA68B, 32))


def _shifted(x: Tensor, shift: int, bits: int) -> Tensor:
    """x ^ (x >>> shift): torch's >> carries the sign down, which the mask takes away."""
    return (x >> shift).bitwise_and_((1 << (bits - shift)) - 1).bitwise_xor_(x)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: every bit of x changes half of the bits of the result."""
    x = _shifted(x, 30, 64).mul_(MULTIPLIERS[0])
    x = _shifted(x, 27, 64).mul_(MULTIPLIERS[1])
    return _shifted(x, 31, 64)


def _mixed_32(x: Tensor) -> Tensor:
    """The same for int32, at a quarter of the cost on a CPU."""
    x = _shifted(x, 16, 32).mul_(MULTIPLIERS_32[0])
    x = _shifted(x, 15, 32).mul_(MULTIPLIERS_32[1])
    return _shifted(x, 16, 32)


def uniform(seed_B: Tensor, position_B: Tensor, vocabulary: int) -> Tensor:
    """A float32 between 0 and 1 for each int64 seed and position and each token, [B, V]; the same on every device.

    It is a multiple of 2^-31 less half of it, so that small numbers, which decide, are as fine as large ones are not.
    """
    # The seed is hashed before the position is added, or seed s at position p + 1 would be seed s + 1 at position p.
    key_B = _mixed(_mixed(seed_B * GAMMA + GAMMA) + position_B * GAMMA)
    tokens_V = torch.arange(1, 1 + vocabulary, dtype=torch.int32, device=key_B.device).mul_(GAMMA_32)
    low_B1, high_B1 = key_B.view(torch.int32).view(-1, 2, 1).unbind(1)
    bits_BV = _mixed_32(_mixed_32(tokens_V ^ low_B1).bitwise_xor_(high_B1))
    return bits_BV.bitwise_and_((1 << 31) - 1).float().add_(0.5).mul_(2.0**-31)


def kept(scaled_BV: Tensor, top_p_B: Tensor, min_p_B: Tensor, top_k_B: Tensor) -> Tensor:
    """Which tokens truncation leaves, as bool [B, V]; at least one."""
    vocabulary = scaled_BV.shape[-1]
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    weights_BV = (sorted_BV - sorted_BV[:, :1]).double().exp()  # relative to the most probable token
    top_k_B1 = torch.where(top_k_B > 0, top_k_B, vocabulary)[:, None]
    keep_BV = torch.arange(vocabulary, device=scaled_BV.device) < top_k_B1
    weights_BV = weights_BV.masked_fill(~keep_BV, 0.0)
    cumulated_BV = weights_BV.cumsum(-1)
    before_BV = cumulated_BV - weights_BV
    # Rounding must not let top_p = 1 cut the tail off.
    top_p_B1 = torch.where(top_p_B < 1, top_p_B, float("inf"))[:, None]
    keep_BV &= before_BV < top_p_B1 * cumulated_BV[:, -1:]
    keep_BV &= weights_BV >= min_p_B[:, None]
    keep_BV[:, 0] = True
    return torch.zeros_like(keep_BV).scatter_(1, order_BV, keep_BV)


def draw_tokens(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    top_k_B: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
    any_random: bool,
    any_truncated: bool,
) -> tuple[Tensor, Tensor]:
    """See the operator's docstring."""
    logits_BV = logits_BV.float()
    # `max` along a dimension tells the first of equals, as `argmax` does, in two thirds of its time on a CPU.
    largest_B1, best_B1 = logits_BV.max(-1, keepdim=True)
    scaled_BV = logits_BV - largest_B1  # first, so that no temperature is too small
    if not any_random:
        return best_B1[:, 0], -scaled_BV.exp_().sum(-1, dtype=torch.float64).log()

    greedy_B = temperature_B < GREEDY_BELOW
    scaled_BV = scaled_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    if any_truncated:
        keep_BV = kept(scaled_BV, top_p_B, min_p_B, top_k_B) | greedy_B[:, None]
        scaled_BV = scaled_BV.masked_fill(~keep_BV, -torch.inf)
    total_B = scaled_BV.exp().sum(-1, dtype=torch.float64)
    # log E, with E = -log(1 - u)
    late_BV = uniform(seed_B, position_B, logits_BV.shape[-1]).neg_().log1p_().neg_().log_()
    drawn_B1 = torch.sub(scaled_BV, late_BV, out=late_BV).max(-1, keepdim=True).indices
    token_B1 = torch.where(greedy_B[:, None], best_B1, drawn_B1)
    return token_B1[:, 0], scaled_BV.gather(1, token_B1)[:, 0].double() - total_B.log()
