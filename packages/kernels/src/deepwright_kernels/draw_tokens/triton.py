"""Drawing tokens as one Triton kernel: a program reads its row a few times, and nothing of a row's size is written.

Sorting is what costs in plain torch, and it is not needed: what truncation leaves is everything nearer to the best
logit than some distance, and of what lies at just that distance the lower ids. The distance is a float that is not
negative, whose bits are an integer of the same order; it is looked for by trying three integers at a time, sixteen
passes over the row at most, for how many tokens (top_k) or how much probability (top_p) lie up to them. Rows that are
not truncated need two passes: the best logit, then the race together with the sum of the weights.

The row stays in the L2 cache meanwhile, so the passes cost what it delivers. Sums are in float64, and a row's are added
up in an order that does not depend on the others.

Shapes: X elements of a tile, of which R rows lie in one thread and C columns beside each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import Operation
from . import GREEDY_BELOW
from .reference import GAMMA, MULTIPLIERS

COLUMNS, ROWS, RACING_ROWS = 2048, 8, 4
INFINITE = 0x7F800000  # bits of the largest distance there is


@triton.jit
def _distances(base, at_X, vocabulary, top, scale):
    """How far the tokens `at_X` lie below the best, in units of the temperature; beyond the vocabulary infinitely."""
    logit_X = tl.load(base + at_X, mask=at_X < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.math.div_rn(top - logit_X, scale)


@triton.jit
def _bits(distance_X):
    return distance_X.to(tl.int32, bitcast=True)


@triton.jit
def _measures(distance_X, BY_COUNT: tl.constexpr):
    """What a token adds up to: one, or its probability in units of the best token's."""
    if BY_COUNT:
        return tl.full(distance_X.shape, 1.0, tl.float64)
    else:
        return tl.exp(-distance_X).to(tl.float64)


@triton.jit
def _up_to(base, vocabulary, top, scale, a, b, c, BY_COUNT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """How much lies up to the distances whose bits are a, b and c."""
    at_RC = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    sum_a_C = tl.zeros((C,), tl.float64)
    sum_b_C = tl.zeros((C,), tl.float64)
    sum_c_C = tl.zeros((C,), tl.float64)
    for start in range(0, vocabulary, R * C):
        distance_RC = _distances(base, start + at_RC, vocabulary, top, scale)
        measure_RC = _measures(distance_RC, BY_COUNT)
        bits_RC = _bits(distance_RC)
        sum_a_C += tl.sum(tl.where(bits_RC <= a, measure_RC, 0.0), axis=0)
        sum_b_C += tl.sum(tl.where(bits_RC <= b, measure_RC, 0.0), axis=0)
        sum_c_C += tl.sum(tl.where(bits_RC <= c, measure_RC, 0.0), axis=0)
    return tl.sum(sum_a_C, axis=0), tl.sum(sum_b_C, axis=0), tl.sum(sum_c_C, axis=0)


@triton.jit
def _cut(base, vocabulary, top, scale, need, high, BY_COUNT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Bits of the smallest distance up to which there is at least `need`, `high` if there is no smaller one; and how
    much lies below it."""
    low = tl.full((), -1, tl.int32)
    below = tl.full((), 0.0, tl.float64)
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        a = low + step
        b = tl.minimum(a + step, high - 1)
        c = tl.minimum(b + step, high - 1)
        sum_a, sum_b, sum_c = _up_to(base, vocabulary, top, scale, a, b, c, BY_COUNT, R, C)
        if sum_a >= need:
            high = a
        elif sum_b >= need:
            low, below, high = a, sum_a, b
        elif sum_c >= need:
            low, below, high = b, sum_b, c
        else:
            low, below = c, sum_c
    return high, below


@triton.jit
def _last_tie(base, vocabulary, top, scale, cut, ties, C: tl.constexpr):
    """The id of the last of the first `ties` tokens at the distance `cut`."""
    last = tl.full((), 0, tl.int32)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, C):
        if seen < ties:
            at_C = start + tl.arange(0, C)
            distance_C = _distances(base, at_C, vocabulary, top, scale)
            tied_C = ((_bits(distance_C) == cut) & (at_C < vocabulary)).to(tl.int32)
            rank_C = seen + tl.cumsum(tied_C, axis=0)
            last = tl.maximum(last, tl.max(tl.where((tied_C == 1) & (rank_C <= ties), at_C, 0), axis=0))
            seen += tl.sum(tied_C, axis=0)
    return last


@triton.jit
def _mixed(x, first, second, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """The finalizer of the reference's hashes, for integers without a sign."""
    x = (x ^ (x >> A)) * first
    x = (x ^ (x >> B)) * second
    return x ^ (x >> C)


@triton.jit
def _uniform(at_X, low, upper):
    """The reference's uniform numbers for the tokens at_X; low, upper: the halves of the key of seed and position."""
    bits_X = ((at_X + 1) * -1640531527).to(tl.uint32, bitcast=True) ^ low
    bits_X = _mixed(bits_X, 0x7FEB352D, 0x846CA68B, 16, 15, 16) ^ upper
    bits_X = _mixed(bits_X, 0x7FEB352D, 0x846CA68B, 16, 15, 16) & 0x7FFFFFFF
    return (bits_X.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 4.656612873077393e-10


@triton.jit
def _log_exponential(uniform_X):
    """log(-log(1 - u)). Small u decide races, so log(1 - u) must be right to the last bits there (Kahan's way)."""
    rest_X = 1.0 - uniform_X
    exact_X = rest_X == 1.0
    slope_X = tl.log(tl.where(exact_X, 0.5, rest_X)) / tl.where(exact_X, 1.0, 1.0 - rest_X)
    return tl.log(tl.where(exact_X, uniform_X, -slope_X * uniform_X))


@triton.jit
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    top_k_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,
    logprob_ptr,
    stride,
    size,
    gamma,
    first,
    second,
    GREEDY_BELOW: tl.constexpr,
    RANDOM: tl.constexpr,
    TRUNCATED: tl.constexpr,
    INFINITE: tl.constexpr,
    R: tl.constexpr,
    RACING_R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    vocabulary = tl.full((), 0, tl.int32) + size

    top_C = tl.full((C,), float("-inf"), tl.float32)
    broken_C = tl.zeros((C,), tl.int32)
    at_RC = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    for start in range(0, size, R * C):
        logit_RC = tl.load(base + start + at_RC, mask=start + at_RC < vocabulary, other=float("-inf")).to(tl.float32)
        broken_C |= tl.max((logit_RC != logit_RC).to(tl.int32), axis=0)
        top_C = tl.maximum(top_C, tl.max(logit_RC, axis=0))
    top = tl.max(top_C, axis=0)
    broken = tl.max(broken_C, axis=0) == 1

    greedy = tl.full((), 1, tl.int1)
    scale = tl.full((), 1.0, tl.float32)
    if RANDOM:
        temperature = tl.load(temperature_ptr + row)
        greedy = temperature < GREEDY_BELOW
        scale = tl.where(greedy, 1.0, temperature)

    cut = tl.full((), INFINITE, tl.int32)
    last = vocabulary
    least = tl.full((), 0.0, tl.float32)
    if TRUNCATED:
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        least = tl.where(greedy, 0.0, tl.load(min_p_ptr + row))
        if (greedy == 0) & (broken == 0):
            ties = vocabulary
            if (top_k > 0) & (top_k < vocabulary):
                cut, below = _cut(base, size, top, scale, top_k.to(tl.float64), cut, True, R, C)
                ties = (top_k - below.to(tl.int64)).to(tl.int32)
            if top_p < 1:
                less, _same, whole = _up_to(base, size, top, scale, cut - 1, cut - 1, INFINITE, False, R, C)
                share = tl.exp(-cut.to(tl.float32, bitcast=True)).to(tl.float64)
                # Of the ties at the cut of top_k, only some are left.
                whole = tl.where(cut < INFINITE, less + ties.to(tl.float64) * share, whole)
                need = top_p.to(tl.float64) * whole
                nearer, below = _cut(base, size, top, scale, need, cut, False, R, C)
                share = tl.exp(-nearer.to(tl.float32, bitcast=True)).to(tl.float64)
                # The first tie is always there, further ones as long as what comes before them does not reach p.
                wanted = (need - below) / tl.where(share > 0, share, 1.0)
                wanted = tl.ceil(tl.maximum(tl.minimum(wanted, vocabulary.to(tl.float64)), 1.0)).to(tl.int32)
                ties = tl.where(nearer < cut, wanted, tl.minimum(ties, wanted))
                cut = nearer
            if cut < INFINITE:
                less, _same, whole = _up_to(base, size, top, scale, cut - 1, cut - 1, cut, True, R, C)
                if whole - less > ties.to(tl.float64):
                    last = _last_tie(base, size, top, scale, cut, ties, C)

    low = tl.full((), 0, tl.uint32)
    upper = tl.full((), 0, tl.uint32)
    if RANDOM:
        key = (tl.load(seed_ptr + row) * gamma + gamma).to(tl.uint64, bitcast=True)
        key = _mixed(key, first, second, 30, 27, 31).to(tl.int64, bitcast=True) + tl.load(position_ptr + row) * gamma
        key = _mixed(key.to(tl.uint64, bitcast=True), first, second, 30, 27, 31)
        low = (key & 0xFFFFFFFF).to(tl.uint32)
        upper = (key >> 32).to(tl.uint32)

    sum_C = tl.zeros((C,), tl.float64)
    best_C = tl.zeros((C,), tl.int32) + vocabulary
    lead_C = tl.full((C,), float("-inf"), tl.float32)
    place_C = tl.zeros((C,), tl.int32) + vocabulary
    racing_RC = tl.arange(0, RACING_R)[:, None] * C + tl.arange(0, C)[None, :]
    for start in range(0, size, RACING_R * C):
        id_RC = start + racing_RC
        distance_RC = _distances(base, id_RC, size, top, scale)
        weight_RC = tl.exp(-distance_RC)
        best_C = tl.minimum(best_C, tl.min(tl.where(distance_RC == 0, id_RC, vocabulary), axis=0))
        if RANDOM:
            race_RC = -distance_RC - _log_exponential(_uniform(id_RC, low, upper))
        if TRUNCATED:
            bits_RC = _bits(distance_RC)
            keep_RC = (bits_RC < cut) | ((bits_RC == cut) & (id_RC <= last))
            keep_RC = keep_RC & (weight_RC >= least)
            race_RC = tl.where(keep_RC, race_RC, float("-inf"))
            weight_RC = tl.where(keep_RC | (weight_RC != weight_RC), weight_RC, 0.0)
        sum_C += tl.sum(weight_RC.to(tl.float64), axis=0)
        if RANDOM:
            ahead_C = tl.max(race_RC, axis=0)
            ahead_at_C = tl.min(tl.where(race_RC == ahead_C[None, :], id_RC, vocabulary), axis=0)
            place_C = tl.where(ahead_C > lead_C, ahead_at_C, place_C)
            lead_C = tl.maximum(lead_C, ahead_C)

    token = tl.min(best_C, axis=0)
    if RANDOM:
        lead = tl.max(lead_C, axis=0)
        token = tl.where(greedy, token, tl.min(tl.where(lead_C == lead, place_C, vocabulary), axis=0))
    token = tl.minimum(token, vocabulary - 1)  # where logits are not numbers
    distance = tl.math.div_rn(top - tl.load(base + token).to(tl.float32), scale)
    logprob = -distance.to(tl.float64) - tl.log(tl.sum(sum_C, axis=0))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(broken, float("nan"), logprob))


def _launch(
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
    rows, vocabulary = logits_BV.shape
    token_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    logprob_B = torch.empty(rows, dtype=torch.float64, device=logits_BV.device)
    if not rows:
        return token_B, logprob_B
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    columns = min(COLUMNS, triton.next_power_of_2(vocabulary))
    _draw_kernel[(rows,)](
        logits_BV,
        temperature_B.contiguous(),
        top_p_B.contiguous(),
        min_p_B.contiguous(),
        top_k_B.contiguous(),
        seed_B.contiguous(),
        position_B.contiguous(),
        token_B,
        logprob_B,
        logits_BV.stride(0),
        vocabulary,
        GAMMA,
        *MULTIPLIERS,
        GREEDY_BELOW=GREEDY_BELOW,
        RANDOM=any_random,
        TRUNCATED=any_random and any_truncated,
        INFINITE=INFINITE,
        R=ROWS,
        RACING_R=RACING_ROWS,
        C=columns,
        num_warps=max(1, min(16, columns // 128)),
    )
    return token_B, logprob_B


draw_tokens = Operation("draw_tokens", _launch)


@draw_tokens.shapes
def _(logits_BV: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = logits_BV.shape[0]
    return logits_BV.new_empty(rows, dtype=torch.int64), logits_BV.new_empty(rows, dtype=torch.float64)
