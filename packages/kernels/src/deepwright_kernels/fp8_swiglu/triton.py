"""SwiGLU with quantisation as Triton kernels: forward one pass along rows, backward one along rows and columns at once.

The backward kernel reads a tile of gates, ups and hidden gradients once and writes five tiles of FP8: the gradients of
gate and up along rows and along columns, and the hidden values along columns. It asks for a hidden size that is a
multiple of 128, so that no block of 128 columns holds gates and ups; with others the gradients are computed by torch's
operations and quantised from there.

Shapes: T tokens, I hidden size, J = 2 I gates and ups, V and U = ⌈T/128⌉ blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_layout import BLOCK, blocks, empty_rows
from ..fp8_rows.triton import (
    load_tile,
    quantise_fp8_columns,
    quantise_fp8_rows_and_columns,
    rows_at_once,
    side_by_side,
    store_columns,
    store_rows,
    tokens_of,
)
from .reference import swiglu_gradients

FORWARD_TOKENS = 16
BACKWARD_TOKENS = 16
BACKWARD_WIDTH = 32
BACKWARD_WARPS = 4


@triton.jit
def rounded(x_TI, ptr):
    """To the dtype that `ptr` points at, as separate operators would do, and back to float32."""
    return x_TI.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _forward_kernel(
    gate_up_ptr,
    values_ptr,
    scale_ptr,
    tokens,
    hidden,
    gate_up_stride,
    values_stride,
    scale_stride,
    POWER_OF_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
):
    across = tl.cdiv(hidden, 128)
    token_T = tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)
    column_I = tl.program_id(0) % across * 128 + tl.arange(0, 128)
    gate_TI = load_tile(gate_up_ptr, token_T, column_I, tokens, hidden, gate_up_stride)
    up_TI = load_tile(gate_up_ptr + hidden, token_T, column_I, tokens, hidden, gate_up_stride)
    hidden_TI = gate_TI * tl.sigmoid(gate_TI) * up_TI
    store_rows(
        rounded(hidden_TI, gate_up_ptr),
        token_T,
        column_I,
        values_ptr,
        scale_ptr,
        tokens,
        hidden,
        values_stride,
        scale_stride,
        POWER_OF_TWO,
    )


@triton.jit
def differentiate(grad_TI, gate_TI, up_TI):
    """h = silu(g) · u; given dh: dg = dh · u · σ(g) · (1 + g · (1 − σ(g))) and du = dh · silu(g). dg, du and h."""
    sigmoid_TI = tl.sigmoid(gate_TI)
    silu_TI = gate_TI * sigmoid_TI
    grad_gate_TI = grad_TI * up_TI * sigmoid_TI * (1.0 + gate_TI * (1.0 - sigmoid_TI))
    return grad_gate_TI, grad_TI * silu_TI, silu_TI * up_TI


@triton.jit
def _backward_kernel(
    grad_ptr,
    gate_up_ptr,
    rows_ptr,
    rows_scale_ptr,
    columns_ptr,
    columns_scale_ptr,
    hidden_ptr,
    hidden_scale_ptr,
    tokens,
    hidden,
    grad_stride,
    gate_up_stride,
    rows_stride,
    rows_scale_stride,
    columns_stride,
    columns_scale_stride,
    hidden_scale_stride,
    POWER_OF_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    # A tile of 128 x 128 in pieces; what the rows have brought is then found in the first-level cache.
    across = hidden // 128
    block = tl.program_id(0) // across
    first_I = tl.program_id(0) % across * 128
    both = 2 * hidden
    up_ptr = gate_up_ptr + hidden
    for start in tl.static_range(0, 128, TOKENS):
        token_T = block * 128 + start + tl.arange(0, TOKENS)
        gate_I = first_I + tl.arange(0, 128)
        gate_TI = load_tile(gate_up_ptr, token_T, gate_I, tokens, hidden, gate_up_stride)
        up_TI = load_tile(up_ptr, token_T, gate_I, tokens, hidden, gate_up_stride)
        grad_TI = load_tile(grad_ptr, token_T, gate_I, tokens, hidden, grad_stride)
        grad_gate_TI, grad_up_TI, _ = differentiate(grad_TI, gate_TI, up_TI)
        store_rows(
            rounded(grad_gate_TI, gate_up_ptr),
            token_T,
            gate_I,
            rows_ptr,
            rows_scale_ptr,
            tokens,
            both,
            rows_stride,
            rows_scale_stride,
            POWER_OF_TWO,
        )
        store_rows(
            rounded(grad_up_TI, gate_up_ptr),
            token_T,
            gate_I + hidden,
            rows_ptr,
            rows_scale_ptr,
            tokens,
            both,
            rows_stride,
            rows_scale_stride,
            POWER_OF_TWO,
        )
    token_T = tokens_of(block, ROWS)
    for start in tl.static_range(0, 128, WIDTH):
        gate_I = first_I + start + tl.arange(0, WIDTH)
        gate_TI = load_tile(gate_up_ptr, token_T, gate_I, tokens, hidden, gate_up_stride)
        up_TI = load_tile(up_ptr, token_T, gate_I, tokens, hidden, gate_up_stride)
        grad_TI = load_tile(grad_ptr, token_T, gate_I, tokens, hidden, grad_stride)
        grad_gate_TI, grad_up_TI, hidden_TI = differentiate(grad_TI, gate_TI, up_TI)
        store_columns(
            rounded(hidden_TI, gate_up_ptr),
            block,
            gate_I,
            hidden_ptr,
            hidden_scale_ptr,
            hidden,
            columns_stride,
            hidden_scale_stride,
            ROWS,
            POWER_OF_TWO,
        )
        store_columns(
            rounded(grad_up_TI, gate_up_ptr),
            block,
            gate_I + hidden,
            columns_ptr,
            columns_scale_ptr,
            both,
            columns_stride,
            columns_scale_stride,
            ROWS,
            POWER_OF_TWO,
        )
        store_columns(
            rounded(grad_gate_TI, gate_up_ptr),
            block,
            gate_I,
            columns_ptr,
            columns_scale_ptr,
            both,
            columns_stride,
            columns_scale_stride,
            ROWS,
            POWER_OF_TWO,
        )


def _launch_forward(gate_up_TJ: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    gate_up_TJ = side_by_side(gate_up_TJ)
    tokens, hidden = gate_up_TJ.shape[0], gate_up_TJ.shape[1] // 2
    values_TI, scale_TV = empty_rows(tokens, hidden, gate_up_TJ.device)
    if gate_up_TJ.numel():
        _forward_kernel[(triton.cdiv(tokens, FORWARD_TOKENS) * blocks(hidden),)](
            gate_up_TJ,
            values_TI,
            scale_TV,
            tokens,
            hidden,
            gate_up_TJ.stride(0),
            values_TI.stride(0),
            scale_TV.stride(1),
            POWER_OF_TWO=power_of_two_scales,
            TOKENS=FORWARD_TOKENS,
            num_warps=4,
        )
    return values_TI, scale_TV


_forward = torch.library.custom_op("deepwright::swiglu_quantise_fp8", _launch_forward, mutates_args=())


@_forward.register_fake
def _(gate_up_TJ: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    return empty_rows(gate_up_TJ.shape[0], gate_up_TJ.shape[1] // 2, gate_up_TJ.device)


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty(gate_up_TJ: Tensor) -> Six:
    (tokens, both), device = gate_up_TJ.shape, gate_up_TJ.device
    rows, columns = empty_rows(tokens, both, device), empty_rows(both, tokens, device)
    return *rows, *columns, *empty_rows(both // 2, tokens, device)


def _launch_backward(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = gate_up_TJ.shape[1] // 2
    grad_TI, gate_up_TJ = side_by_side(grad_TI), side_by_side(gate_up_TJ)
    outputs = _empty(gate_up_TJ)
    rows, rows_scale, columns, columns_scale, _, hidden_scale = outputs
    if gate_up_TJ.numel():
        _backward_kernel[(blocks(gate_up_TJ.shape[0]) * (hidden // BLOCK),)](
            grad_TI,
            gate_up_TJ,
            *outputs,
            gate_up_TJ.shape[0],
            hidden,
            grad_TI.stride(0),
            gate_up_TJ.stride(0),
            rows.stride(0),
            rows_scale.stride(1),
            columns.stride(0),
            columns_scale.stride(1),
            hidden_scale.stride(1),
            POWER_OF_TWO=power_of_two_scales,
            TOKENS=BACKWARD_TOKENS,
            WIDTH=BACKWARD_WIDTH,
            ROWS=rows_at_once(gate_up_TJ, BACKWARD_WIDTH, BACKWARD_WARPS),
            num_warps=BACKWARD_WARPS,
        )
    return outputs


_backward = torch.library.custom_op("deepwright::swiglu_backward_quantise_fp8", _launch_backward, mutates_args=())


@_backward.register_fake
def _(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(gate_up_TJ)


def swiglu_quantise_fp8(gate_up_TJ: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [T, I] and scales [T, V] of silu(gate) · up."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_forward if torch.compiler.is_compiling() else _launch_forward)(gate_up_TJ, power_of_two_scales)


def swiglu_backward_quantise_fp8(grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool) -> Six:
    """The gradient of gate and up along rows and along columns, and the hidden values along columns."""
    if gate_up_TJ.shape[1] // 2 % BLOCK:
        grad_TJ, hidden_TI = swiglu_gradients(grad_TI, gate_up_TJ)
        return (
            *quantise_fp8_rows_and_columns(grad_TJ, power_of_two_scales),
            *quantise_fp8_columns(hidden_TI, power_of_two_scales),
        )
    return (_backward if torch.compiler.is_compiling() else _launch_backward)(grad_TI, gate_up_TJ, power_of_two_scales)
