"""The race as one Triton kernel: a program takes a row through its logits twice, the second time out of the cache.

The first pass finds the most probable token. The second adds up the probabilities relative to it, in float64 from block
to block, and runs the race: exponential numbers are made in registers and never exist in memory.

Shapes: V a block of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import Operation
from .reference import GAMMA, GAMMA_32, MULTIPLIERS, MULTIPLIERS_32

LARGEST_BLOCK = 4096
_GAMMA, _FIRST, _SECOND = (tl.constexpr(value) for value in (GAMMA, *MULTIPLIERS))
_GAMMA_32, _FIRST_32, _SECOND_32 = (tl.constexpr(value) for value in (GAMMA_32, *MULTIPLIERS_32))


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 30)) * tl.full((), _FIRST, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), _SECOND, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _mixed_32(x):
    x = (x ^ (x >> 16)) * tl.full((), _FIRST_32, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), _SECOND_32, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _log_of_exponential(u_V):
    """log(-log(1 - u)). Where 1 - u would lose the digits of a small u, a series."""
    series_V = u_V * (1.0 + u_V * (1.0 / 2 + u_V * (1.0 / 3 + u_V * (1.0 / 4 + u_V * (1.0 / 5 + u_V * (1.0 / 6))))))
    return tl.log(tl.where(u_V < 0.0625, series_V, -tl.log(1.0 - u_V)))


@triton.jit
def _race_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,
    logprob_ptr,
    stride,
    vocabulary,
    greedy_below,
    RANDOM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    line_ptr = logits_ptr + row.to(tl.int64) * stride
    offset_V = tl.arange(0, BLOCK_V)
    top = float("-inf")
    best = 0
    for start in range(0, vocabulary, BLOCK_V):
        token_V = start + offset_V
        logit_V = tl.load(line_ptr + token_V, mask=token_V < vocabulary, other=float("-inf")).to(tl.float32)
        block_top = tl.max(logit_V, axis=0)
        block_best = tl.min(tl.where(logit_V == block_top, token_V, vocabulary), axis=0)
        best = tl.where(block_top > top, block_best, best)  # of equals the first stays
        top = tl.maximum(top, block_top)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature < greedy_below
    divisor = tl.where(greedy, 1.0, temperature)
    if RANDOM:
        gamma = tl.full((), _GAMMA, tl.uint64)
        seed, position = tl.load(seed_ptr + row).to(tl.uint64), tl.load(position_ptr + row).to(tl.uint64)
        key = _mixed(_mixed(seed * gamma + gamma) + position * gamma)
        low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    total = tl.zeros((), dtype=tl.float64)
    first = float("-inf")
    drawn = best
    for start in range(0, vocabulary, BLOCK_V):
        token_V = start + offset_V
        inside_V = token_V < vocabulary
        logit_V = tl.load(line_ptr + token_V, mask=inside_V, other=float("-inf")).to(tl.float32)
        scaled_V = (logit_V - top) / divisor
        total += tl.sum(tl.where(inside_V, tl.exp(scaled_V), 0.0), axis=0).to(tl.float64)
        if RANDOM:
            hash_V = _mixed_32((token_V + 1).to(tl.uint32) * tl.full((), _GAMMA_32, tl.uint32) ^ low)
            bits_V = (_mixed_32(hash_V ^ high) & 0x7FFFFFFF).to(tl.int32)
            arrival_V = scaled_V - _log_of_exponential((bits_V.to(tl.float32) + 0.5) * (1.0 / 2147483648.0))
            arrival_V = tl.where(inside_V, arrival_V, float("-inf"))
            block_first = tl.max(arrival_V, axis=0)
            block_drawn = tl.min(tl.where(arrival_V == block_first, token_V, vocabulary), axis=0)
            drawn = tl.where(block_first > first, block_drawn, drawn)
            first = tl.maximum(first, block_first)
    token = tl.minimum(tl.where(greedy, best, drawn), vocabulary - 1)
    tl.store(token_ptr + row, token.to(tl.int64))
    value = ((tl.load(line_ptr + token).to(tl.float32) - top) / divisor).to(tl.float64)
    tl.store(logprob_ptr + row, value - tl.log(total))


def _launch(
    logits_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, greedy_below: float, any_random: bool
) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits_BV.shape
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    token_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    logprob_B = torch.empty(rows, dtype=torch.float64, device=logits_BV.device)
    if rows:
        block = min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary))
        _race_kernel[(rows,)](
            logits_BV,
            temperature_B.contiguous(),
            seed_B.contiguous(),
            position_B.contiguous(),
            token_B,
            logprob_B,
            logits_BV.stride(0),
            vocabulary,
            greedy_below,
            RANDOM=any_random,
            BLOCK_V=block,
            num_warps=min(16, max(1, block // 256)),
        )
    return token_B, logprob_B


_race = Operation("token_race", _launch)


@_race.shapes
def _(
    logits_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, greedy_below: float, any_random: bool
) -> tuple[Tensor, Tensor]:
    rows = logits_BV.shape[0]
    return logits_BV.new_empty(rows, dtype=torch.int64), logits_BV.new_empty(rows, dtype=torch.float64)


def token_race(
    logits_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, greedy_below: float, any_random: bool
) -> tuple[Tensor, Tensor]:
    """(tokens, log-probabilities)."""
    return _race(logits_BV, temperature_B, seed_B, position_B, greedy_below, any_random)
