"""The router as one Triton kernel forward and one backward.

Forward, a program walks over tiles of rows with a warp for each row, so that everything about a row stays in one warp's
registers: scores, group choice, top-k. Floats are compared as integers of the same order, for which a warp has a
reduction in one instruction; the position of a maximum is a second reduction, of the columns that hold it, and so the
lowest column wins. What was chosen is marked in place, and the marks of all of a program's rows are added up in
registers before they go to the counts: one atomic addition of integers for each program and expert, whose sum does not
depend on the order.

The chosen scores are computed a second time from their logits (a gather from the cache) instead of being carried along.

Shapes: T rows of a tile, E columns (groups padded to a power of two each), G groups, X columns of a group, K choices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import Operation

ROWS = 16
PROGRAMS_PER_PROCESSOR = 2
PROGRAMS_ON_CPU = 2  # the interpreter runs them one after another


@triton.jit
def _ordered(value):
    """Integers that compare as the floats do."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_of(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    scores_ptr,
    counts_ptr,
    tokens,
    scaling,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHOSEN: tl.constexpr = -2147483648  # below every float
    DROPPED: tl.constexpr = -2139095041  # -inf
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_X
    SIZE: tl.constexpr = EXPERTS // GROUPS
    column_E = tl.arange(0, BLOCK_E)
    if SIZE == BLOCK_X:
        expert_E = column_E
        real_E = column_E < EXPERTS
    else:
        expert_E = column_E // BLOCK_X * SIZE + column_E % BLOCK_X
        real_E = (column_E % BLOCK_X < SIZE) & (column_E // BLOCK_X < GROUPS)
    choice_K = tl.arange(0, BLOCK_K)
    if HAS_BIAS:
        bias_E = tl.load(bias_ptr + expert_E, mask=real_E, other=0.0)
    counts_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        row_T = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside_T = row_T < tokens
        here_TE = inside_T[:, None] & real_E[None, :]
        logit_TE = tl.load(logits_ptr + row_T[:, None] * EXPERTS + expert_E[None, :], mask=here_TE, other=float("-inf"))
        if SIGMOID:
            score_TE = 1.0 / (1.0 + tl.exp(-logit_TE))
        else:
            top_T = tl.where(inside_T, tl.max(logit_TE, axis=1), 0.0)
            power_TE = tl.exp(logit_TE - top_T[:, None])
            sum_T = tl.where(inside_T, tl.sum(power_TE, axis=1), 1.0)
            score_TE = power_TE / sum_T[:, None]
        tl.store(scores_ptr + row_T[:, None] * EXPERTS + expert_E[None, :], score_TE, mask=here_TE)

        ordered_TE = _ordered(score_TE + bias_E[None, :]) if HAS_BIAS else _ordered(score_TE)
        ordered_TE = tl.where(real_E[None, :], ordered_TE, CHOSEN)
        if TOP_GROUPS < GROUPS:
            rest_TGX = tl.reshape(ordered_TE, (BLOCK_T, BLOCK_G, BLOCK_X))
            column_X = tl.arange(0, BLOCK_X)[None, None, :]
            group_G = tl.arange(0, BLOCK_G)[None, :]
            best_TG = tl.max(rest_TGX, axis=2)
            worth_TG = _float_of(best_TG)
            for _ in tl.static_range(GROUP_BEST - 1):
                place_TG = tl.min(tl.where(rest_TGX == best_TG[:, :, None], column_X, BLOCK_X), axis=2)
                rest_TGX = tl.where(column_X == place_TG[:, :, None], CHOSEN, rest_TGX)
                best_TG = tl.max(rest_TGX, axis=2)
                worth_TG += _float_of(best_TG)
            ranked_TG = tl.where(group_G < GROUPS, _ordered(worth_TG), CHOSEN)
            for _ in tl.static_range(TOP_GROUPS):
                best_T = tl.max(ranked_TG, axis=1)
                place_T = tl.min(tl.where(ranked_TG == best_T[:, None], group_G, BLOCK_G), axis=1)
                ranked_TG = tl.where(group_G == place_T[:, None], CHOSEN, ranked_TG)
            kept_TGX = tl.broadcast_to((ranked_TG == CHOSEN)[:, :, None], (BLOCK_T, BLOCK_G, BLOCK_X))
            kept_TE = tl.reshape(kept_TGX, (BLOCK_T, BLOCK_E))
            ordered_TE = tl.where(kept_TE | (ordered_TE == CHOSEN), ordered_TE, DROPPED)

        place_TK = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
        for choice in tl.static_range(TOP_K):
            best_T = tl.max(ordered_TE, axis=1)
            place_T = tl.min(tl.where(ordered_TE == best_T[:, None], column_E[None, :], BLOCK_E), axis=1)
            ordered_TE = tl.where(column_E[None, :] == place_T[:, None], CHOSEN, ordered_TE)
            place_TK = tl.where(choice_K[None, :] == choice, place_T[:, None], place_TK)
        counts_TE += tl.where((ordered_TE == CHOSEN) & here_TE, 1, 0)

        expert_TK = place_TK if SIZE == BLOCK_X else place_TK // BLOCK_X * SIZE + place_TK % BLOCK_X
        here_TK = inside_T[:, None] & (choice_K[None, :] < TOP_K)
        logit_TK = tl.load(logits_ptr + row_T[:, None] * EXPERTS + expert_TK, mask=here_TK, other=float("-inf"))
        weight_TK = 1.0 / (1.0 + tl.exp(-logit_TK)) if SIGMOID else tl.exp(logit_TK - top_T[:, None]) / sum_T[:, None]
        if NORMALISE:
            weight_TK = weight_TK / (tl.sum(tl.where(here_TK, weight_TK, 0.0), axis=1) + 1e-20)[:, None]
        out_TK = row_T[:, None] * TOP_K + choice_K[None, :]
        tl.store(experts_ptr + out_TK, expert_TK.to(tl.int64), mask=here_TK)
        tl.store(weights_ptr + out_TK, weight_TK * scaling, mask=here_TK)
    counts_E = tl.sum(counts_TE, axis=0)
    tl.atomic_add(counts_ptr + expert_E, counts_E.to(tl.int64), mask=real_E & (counts_E > 0), sem="relaxed")


@triton.jit
def _route_backward_kernel(
    grad_weights_ptr,
    grad_scores_ptr,
    experts_ptr,
    scores_ptr,
    grad_logits_ptr,
    tokens,
    scaling,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_GRAD_SCORES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # With S = Σ_j s_j + 1e-20 over the chosen: dL/ds_k = scaling / S · (g_k − Σ_j g_j s_j / S).
    row_T = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside_T = row_T < tokens
    expert_E, choice_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    here_TE = inside_T[:, None] & (expert_E[None, :] < EXPERTS)
    here_TK = inside_T[:, None] & (choice_K[None, :] < TOP_K)
    at_TE = row_T[:, None] * EXPERTS + expert_E[None, :]
    at_TK = row_T[:, None] * TOP_K + choice_K[None, :]
    score_TE = tl.load(scores_ptr + at_TE, mask=here_TE, other=0.0)
    grad_TK = tl.load(grad_weights_ptr + at_TK, mask=here_TK, other=0.0) * scaling
    expert_TK = tl.load(experts_ptr + at_TK, mask=here_TK, other=0).to(tl.int32)
    if NORMALISE:
        score_TK = tl.load(scores_ptr + row_T[:, None] * EXPERTS + expert_TK, mask=here_TK, other=0.0)
        sum_T = tl.sum(score_TK, axis=1) + 1e-20
        grad_TK = (grad_TK - (tl.sum(grad_TK * score_TK, axis=1) / sum_T)[:, None]) / sum_T[:, None]
    if HAS_GRAD_SCORES:
        grad_TE = tl.load(grad_scores_ptr + at_TE, mask=here_TE, other=0.0)
    else:
        grad_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        expert_T = tl.sum(tl.where(choice_K[None, :] == choice, expert_TK, 0), axis=1)
        grad_T = tl.sum(tl.where(choice_K[None, :] == choice, grad_TK, 0.0), axis=1)
        grad_TE += tl.where(expert_E[None, :] == expert_T[:, None], grad_T[:, None], 0.0)
    if SIGMOID:
        grad_TE = grad_TE * score_TE * (1.0 - score_TE)
    else:
        grad_TE = score_TE * (grad_TE - tl.sum(grad_TE * score_TE, axis=1)[:, None])
    tl.store(grad_logits_ptr + at_TE, grad_TE, mask=here_TE)


def _programs(tiles: int, device: torch.device) -> int:
    if device.type != "cuda":
        return min(tiles, PROGRAMS_ON_CPU)
    return min(tiles, PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count)


def _tile(experts: int, tokens: int) -> tuple[int, int]:
    """Rows of a tile and warps: a row a warp, fewer warps where rows are so long that registers run out."""
    rows = ROWS if experts <= 512 else max(1, ROWS * 512 // triton.next_power_of_2(experts))
    return min(rows, max(1, triton.next_power_of_2(triton.cdiv(tokens, 128)))), rows


def _launch(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    sigmoid: bool,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    logits_TE = logits_TE.contiguous()
    experts_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    scores_TE = torch.empty_like(logits_TE)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=logits_TE.device)
    if not tokens:
        return experts_TK, weights_TK, scores_TE, counts_E
    limited = top_groups < groups
    if not limited:
        groups, top_groups = 1, 1
    rows, _ = _tile(experts, tokens)
    _route_kernel[(_programs(triton.cdiv(tokens, rows), logits_TE.device),)](
        logits_TE,
        logits_TE if bias_E is None else bias_E.contiguous(),
        experts_TK,
        weights_TK,
        scores_TE,
        counts_E,
        tokens,
        scaling,
        EXPERTS=experts,
        GROUPS=groups,
        TOP_GROUPS=top_groups,
        GROUP_BEST=group_best,
        TOP_K=top_k,
        SIGMOID=sigmoid,
        NORMALISE=normalise,
        HAS_BIAS=bias_E is not None,
        BLOCK_T=rows,
        BLOCK_G=triton.next_power_of_2(groups),
        BLOCK_X=triton.next_power_of_2(experts // groups),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=rows,
    )
    return experts_TK, weights_TK, scores_TE, counts_E


_route = Operation("route", _launch)


@_route.shapes
def shapes(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    sigmoid: bool,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the results' shapes."""
    tokens, experts = logits_TE.shape
    return (
        logits_TE.new_empty(tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(tokens, top_k),
        torch.empty_like(logits_TE, memory_format=torch.contiguous_format),
        logits_TE.new_empty(experts, dtype=torch.int64),
    )


def _launch_backward(
    grad_weights_TK: Tensor | None,
    grad_scores_TE: Tensor | None,
    experts_TK: Tensor,
    scores_TE: Tensor,
    sigmoid: bool,
    normalise: bool,
    scaling: float,
) -> Tensor:
    tokens, experts = scores_TE.shape
    top_k = experts_TK.shape[1]
    grad_logits_TE = torch.empty_like(scores_TE)
    if not tokens:
        return grad_logits_TE
    if grad_weights_TK is None:
        grad_weights_TK = scores_TE.new_zeros(tokens, top_k)
    rows = max(1, min(4, 2048 // triton.next_power_of_2(experts)))
    _route_backward_kernel[(triton.cdiv(tokens, rows),)](
        grad_weights_TK.contiguous(),
        scores_TE if grad_scores_TE is None else grad_scores_TE.contiguous(),
        experts_TK,
        scores_TE,
        grad_logits_TE,
        tokens,
        scaling,
        EXPERTS=experts,
        TOP_K=top_k,
        SIGMOID=sigmoid,
        NORMALISE=normalise,
        HAS_GRAD_SCORES=grad_scores_TE is not None,
        BLOCK_T=rows,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=rows,
    )
    return grad_logits_TE


_route_backward = Operation("route_backward", _launch_backward)


@_route_backward.shapes
def _(
    grad_weights_TK: Tensor | None,
    grad_scores_TE: Tensor | None,
    experts_TK: Tensor,
    scores_TE: Tensor,
    sigmoid: bool,
    normalise: bool,
    scaling: float,
) -> Tensor:
    return torch.empty_like(scores_TE)


def keep(ctx, inputs, output) -> None:
    _logits, _bias, _top_k, ctx.sigmoid, _groups, _top_groups, _best, ctx.normalise, ctx.scaling = inputs
    ctx.save_for_backward(output[0], output[2])
    ctx.set_materialize_grads(False)


def gradients(ctx, _grad_experts, grad_weights_TK, grad_scores_TE, _grad_counts):
    if grad_weights_TK is None and grad_scores_TE is None:
        return (None,) * 9
    experts_TK, scores_TE = ctx.saved_tensors
    grad_logits_TE = _route_backward(
        grad_weights_TK, grad_scores_TE, experts_TK, scores_TE, ctx.sigmoid, ctx.normalise, ctx.scaling
    )
    return (grad_logits_TE, *(None,) * 8)


_route.gradients(gradients, keep)


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    scoring: str,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the operator's docstring."""
    return _route(logits_TE, bias_E, top_k, scoring == "sigmoid", groups, top_groups, group_best, normalise, scaling)
