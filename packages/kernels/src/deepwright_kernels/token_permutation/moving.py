"""The moves into expert order and back as Triton kernels, each one pass over memory.

A program owns a token. Into expert order, it reads the token's row once and writes it K times; rows that no token
writes (gaps) are cleared by further programs of the same launch. Back, it reads the K rows that belong to the token and
adds them up in float32, always k = 0 .. K - 1. The gradient of one move is the other. The gradient of the weighted sum
reads the token's gradient once, and for each copy reads what the expert made, for the weight's gradient, and writes
the weighted gradient, in the same pass.

Shapes: T tokens, K copies of each, D width, R rows in expert order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import Operation

# A row, or a piece of it: 16 bytes a thread four times over, for four warps.
LARGEST_BLOCK = 2048
GAP_ROWS = 32


@triton.jit
def _clear_gaps(out_ptr, order_ptr, block, rows, width, GAP_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros in those of a block of rows that no copy lies in."""
    for row in range(block * GAP_ROWS, tl.minimum((block + 1) * GAP_ROWS, rows)):
        if tl.load(order_ptr + row) < 0:
            for first in range(0, width, BLOCK_D):
                column_D = first + tl.arange(0, BLOCK_D)
                zero_D = tl.zeros((BLOCK_D,), dtype=out_ptr.dtype.element_ty)
                tl.store(out_ptr + tl.cast(row, tl.int64) * width + column_D, zero_D, mask=column_D < width)


@triton.jit
def _spread_kernel(
    x_ptr,
    order_ptr,
    place_ptr,
    out_ptr,
    x_stride,
    tokens,
    rows,
    width,
    K: tl.constexpr,
    GAP_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    if program < tokens:
        token = program.to(tl.int64)
        for first in range(0, width, BLOCK_D):
            column_D = first + tl.arange(0, BLOCK_D)
            inside_D = column_D < width
            x_D = tl.load(x_ptr + token * x_stride + column_D, mask=inside_D)
            for k in tl.static_range(K):
                place = tl.load(place_ptr + token * K + k).to(tl.int64)
                tl.store(out_ptr + place * width + column_D, x_D, mask=inside_D)
    else:
        _clear_gaps(out_ptr, order_ptr, program - tokens, rows, width, GAP_ROWS, BLOCK_D)


@triton.jit
def _gather_kernel(
    y_ptr,
    place_ptr,
    weights_ptr,
    out_ptr,
    y_stride,
    width,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, width, BLOCK_D):
        column_D = first + tl.arange(0, BLOCK_D)
        inside_D = column_D < width
        sum_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for k in tl.static_range(K):
            place = tl.load(place_ptr + token * K + k).to(tl.int64)
            y_D = tl.load(y_ptr + place * y_stride + column_D, mask=inside_D, other=0.0).to(tl.float32)
            if WEIGHTED:
                y_D = y_D * tl.load(weights_ptr + token * K + k).to(tl.float32)
            sum_D += y_D
        tl.store(out_ptr + token * width + column_D, sum_D.to(out_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def _gather_backward_kernel(
    grad_ptr,
    y_ptr,
    order_ptr,
    place_ptr,
    weights_ptr,
    grad_y_ptr,
    grad_weights_ptr,
    grad_stride,
    y_stride,
    tokens,
    rows,
    width,
    K: tl.constexpr,
    GAP_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    if program < tokens:
        token = program.to(tl.int64)
        choice_K = tl.arange(0, BLOCK_K)
        grad_weight_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for first in range(0, width, BLOCK_D):
            column_D = first + tl.arange(0, BLOCK_D)
            inside_D = column_D < width
            grad_D = tl.load(grad_ptr + token * grad_stride + column_D, mask=inside_D, other=0.0).to(tl.float32)
            for k in tl.static_range(K):
                place = tl.load(place_ptr + token * K + k).to(tl.int64)
                weight = tl.load(weights_ptr + token * K + k).to(tl.float32)
                y_D = tl.load(y_ptr + place * y_stride + column_D, mask=inside_D, other=0.0).to(tl.float32)
                grad_y_D = (grad_D * weight).to(grad_y_ptr.dtype.element_ty)
                tl.store(grad_y_ptr + place * width + column_D, grad_y_D, mask=inside_D)
                grad_weight_K += tl.where(choice_K == k, tl.sum(grad_D * y_D, axis=0), 0.0)
        tl.store(
            grad_weights_ptr + token * K + choice_K,
            grad_weight_K.to(grad_weights_ptr.dtype.element_ty),
            mask=choice_K < K,
        )
    else:
        _clear_gaps(grad_y_ptr, order_ptr, program - tokens, rows, width, GAP_ROWS, BLOCK_D)


def _block(width: int) -> dict[str, int]:
    block = min(LARGEST_BLOCK, triton.next_power_of_2(width))
    return {"BLOCK_D": block, "num_warps": min(8, max(1, block // 512))}


def _gap_programs(rows: int, copies: int) -> int:
    return triton.cdiv(rows, GAP_ROWS) if rows > copies else 0


def _rows(x_RD: Tensor) -> Tensor:
    return x_RD if x_RD.stride(-1) == 1 else x_RD.contiguous()


def _spread(x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    (tokens, copies), rows, width = place_TK.shape, len(order_R), x_TD.shape[1]
    x_TD = _rows(x_TD)
    out_RD = torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device)
    if out_RD.numel():
        _spread_kernel[(tokens + _gap_programs(rows, tokens * copies),)](
            x_TD,
            order_R,
            place_TK,
            out_RD,
            x_TD.stride(0),
            tokens,
            rows,
            width,
            K=copies,
            GAP_ROWS=GAP_ROWS,
            **_block(width),
        )
    return out_RD


_permute = Operation("permute", _spread)


@_permute.shapes
def _(x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


def _gather(y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    (tokens, copies), width = place_TK.shape, y_RD.shape[1]
    y_RD = _rows(y_RD)
    out_TD = torch.empty(tokens, width, dtype=y_RD.dtype, device=y_RD.device)
    if out_TD.numel():
        _gather_kernel[(tokens,)](
            y_RD,
            place_TK,
            y_RD if weights_TK is None else weights_TK.contiguous(),
            out_TD,
            y_RD.stride(0),
            width,
            K=copies,
            WEIGHTED=weights_TK is not None,
            **_block(width),
        )
    return out_TD


_unpermute = Operation("unpermute", _gather)


@_unpermute.shapes
def _(y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    return y_RD.new_empty(place_TK.shape[0], y_RD.shape[1])


def _gather_backward(
    grad_TD: Tensor, y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    (tokens, copies), (rows, width) = place_TK.shape, y_RD.shape
    grad_TD, y_RD = _rows(grad_TD), _rows(y_RD)
    grad_RD = torch.empty(rows, width, dtype=y_RD.dtype, device=y_RD.device)
    grad_weights_TK = torch.empty(tokens, copies, dtype=weights_TK.dtype, device=y_RD.device)
    if grad_RD.numel():
        _gather_backward_kernel[(tokens + _gap_programs(rows, tokens * copies),)](
            grad_TD,
            y_RD,
            order_R,
            place_TK,
            weights_TK.contiguous(),
            grad_RD,
            grad_weights_TK,
            grad_TD.stride(0),
            y_RD.stride(0),
            tokens,
            rows,
            width,
            K=copies,
            GAP_ROWS=GAP_ROWS,
            BLOCK_K=triton.next_power_of_2(copies),
            **_block(width),
        )
    return grad_RD, grad_weights_TK


_unpermute_backward = Operation("unpermute_backward", _gather_backward)


@_unpermute_backward.shapes
def _(grad_TD: Tensor, y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_RD, memory_format=torch.contiguous_format), torch.empty_like(
        weights_TK, memory_format=torch.contiguous_format
    )


def _keep_order(ctx, inputs, output) -> None:
    _x, *order = inputs
    ctx.save_for_backward(*order)


def _sum_of_copies(ctx, grad_RD):
    return sum_copies(grad_RD, *ctx.saved_tensors), None, None


def _keep_all(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _weighted_gradients(ctx, grad_TD):
    grad_RD, grad_weights_TK = _unpermute_backward(grad_TD, *ctx.saved_tensors)
    return grad_RD, None, None, grad_weights_TK


_permute.gradients(_sum_of_copies, _keep_order)
_unpermute.gradients(_weighted_gradients, _keep_all)


def permute(x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's row at the places of its copies, zeros in the gaps."""
    return _permute(x_TD, order_R, place_TK)


def unpermute(y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ_k weights[t, k] · y[place[t, k]], in float32."""
    return _unpermute(y_RD, order_R, place_TK, weights_TK)


def sum_copies(y_RD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    """Σ_k y[place[t, k]], in float32: the gradient of `permute`."""
    return _unpermute(y_RD, order_R, place_TK, None)
