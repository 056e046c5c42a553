"""SwiGLU with quantisation as Triton kernels: forward one kernel, backward one before those that quantise activations.

Backward is not fused: a tile's five results and what they need do not fit into the registers of a Triton program, and
loading it again for each of them took longer than writing bf16 and quantising that.

Shapes: T tokens, I hidden size, J = 2 I gates and ups, V blocks of 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_layout import blocks, empty_rows
from ..fp8_rows.triton import (
    load_tile,
    quantise_fp8_columns,
    quantise_fp8_rows_and_columns,
    side_by_side,
    store_rows,
)

TOKENS = 16  # of a tile with 128 columns


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
        hidden_TI.to(gate_up_ptr.dtype.element_ty).to(tl.float32),  # rounded as separate operators would do
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
def _gradients_kernel(
    grad_ptr,
    gate_up_ptr,
    grad_gate_up_ptr,
    hidden_ptr,
    tokens,
    hidden,
    grad_stride,
    gate_up_stride,
    TOKENS: tl.constexpr,
):
    # h = silu(g) · u; given dh: du = dh · silu(g) and dg = dh · u · σ(g) · (1 + g · (1 − σ(g))).
    across = tl.cdiv(hidden, 128)
    token_T = tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)
    column_I = tl.program_id(0) % across * 128 + tl.arange(0, 128)
    grad_TI = load_tile(grad_ptr, token_T, column_I, tokens, hidden, grad_stride)
    gate_TI = load_tile(gate_up_ptr, token_T, column_I, tokens, hidden, gate_up_stride)
    up_TI = load_tile(gate_up_ptr + hidden, token_T, column_I, tokens, hidden, gate_up_stride)
    sigmoid_TI = tl.sigmoid(gate_TI)
    silu_TI = gate_TI * sigmoid_TI
    inside_TI = (token_T[:, None] < tokens) & (column_I[None, :] < hidden)
    first_TI = token_T.to(tl.int64)[:, None] * hidden + column_I[None, :]
    kind = gate_up_ptr.dtype.element_ty
    tl.store(hidden_ptr + first_TI, (silu_TI * up_TI).to(kind), mask=inside_TI)
    first_TI += token_T.to(tl.int64)[:, None] * hidden
    grad_gate_TI = grad_TI * up_TI * sigmoid_TI * (1.0 + gate_TI * (1.0 - sigmoid_TI))
    tl.store(grad_gate_up_ptr + first_TI, grad_gate_TI.to(kind), mask=inside_TI)
    tl.store(grad_gate_up_ptr + hidden + first_TI, (grad_TI * silu_TI).to(kind), mask=inside_TI)


def _launch_forward(gate_up_TJ: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    gate_up_TJ = side_by_side(gate_up_TJ)
    tokens, hidden = gate_up_TJ.shape[0], gate_up_TJ.shape[1] // 2
    values_TI, scale_TV = empty_rows(tokens, hidden, gate_up_TJ.device)
    if gate_up_TJ.numel():
        _forward_kernel[(triton.cdiv(tokens, TOKENS) * blocks(hidden),)](
            gate_up_TJ,
            values_TI,
            scale_TV,
            tokens,
            hidden,
            gate_up_TJ.stride(0),
            values_TI.stride(0),
            scale_TV.stride(1),
            POWER_OF_TWO=power_of_two_scales,
            TOKENS=TOKENS,
            num_warps=4,
        )
    return values_TI, scale_TV


_forward = torch.library.custom_op("deepwright::swiglu_quantise_fp8", _launch_forward, mutates_args=())


@_forward.register_fake
def _(gate_up_TJ: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    return empty_rows(gate_up_TJ.shape[0], gate_up_TJ.shape[1] // 2, gate_up_TJ.device)


def _launch_gradients(grad_TI: Tensor, gate_up_TJ: Tensor) -> tuple[Tensor, Tensor]:
    grad_TI, gate_up_TJ = side_by_side(grad_TI), side_by_side(gate_up_TJ)
    tokens, hidden = grad_TI.shape
    grad_TJ, hidden_TI = gate_up_TJ.new_empty(tokens, 2 * hidden), grad_TI.new_empty(tokens, hidden)
    if grad_TI.numel():
        _gradients_kernel[(triton.cdiv(tokens, TOKENS) * blocks(hidden),)](
            grad_TI,
            gate_up_TJ,
            grad_TJ,
            hidden_TI,
            tokens,
            hidden,
            grad_TI.stride(0),
            gate_up_TJ.stride(0),
            TOKENS=TOKENS,
            num_warps=4,
        )
    return grad_TJ, hidden_TI


_gradients = torch.library.custom_op("deepwright::swiglu_gradients", _launch_gradients, mutates_args=())


@_gradients.register_fake
def _(grad_TI: Tensor, gate_up_TJ: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up_TJ.new_empty(gate_up_TJ.shape), grad_TI.new_empty(grad_TI.shape)


def swiglu_quantise_fp8(gate_up_TJ: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [T, I] and scales [T, V] of silu(gate) · up."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_forward if torch.compiler.is_compiling() else _launch_forward)(gate_up_TJ, power_of_two_scales)


def swiglu_backward_quantise_fp8(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of gate and up along rows and along columns, and the hidden values along columns."""
    gradients = _gradients if torch.compiler.is_compiling() else _launch_gradients
    grad_TJ, hidden_TI = gradients(grad_TI, gate_up_TJ)
    return (
        *quantise_fp8_rows_and_columns(grad_TJ, power_of_two_scales),
        *quantise_fp8_columns(hidden_TI, power_of_two_scales),
    )
