"""The first half of the experts as one persistent Triton kernel: rows are gathered, SwiGLU is made in registers.

A tile of rows is multiplied by the gate's and by the up projection's columns for the same outputs, as one product whose
right operand is both blocks of weights side by side, brought by one TMA copy. So silu(gate) · up is made in registers,
and neither the permuted rows nor the two projections pass through memory. The rows are gathered by asynchronous copies
on the way into shared memory.

For the backward pass the projections are kept, in the dtype of the input, and written by the same kernel; the permuted
rows are made again then, for the gradient of the weights. gate and up are rounded to the input's dtype before silu, so
that training and inference see the same numbers.

Shapes: T tokens, K copies of each, D hidden, E experts, I expert width, R rows in expert order; tiles of M rows, J
outputs, S of the summed dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..grouped_linear.triton import (
    BAND,
    FEW_ROWS,
    LONG_SUM,
    group_tiles,
    operands,
    place_of,
    programs,
    rows_backward,
    weights_backward,
)
from ..operation import Operation
from ..token_permutation.moving import permute, sum_copies

TILE = {"BLOCK_M": 128, "BLOCK_J": 128, "BLOCK_S": 64, "num_warps": 8, "num_stages": 3, "FLATTEN": True}
LONG_SUM_TILE = {**TILE, "FLATTEN": False}
FEW_ROWS_TILE = {"BLOCK_M": 64, "BLOCK_J": 64, "BLOCK_S": 128, "num_warps": 4, "num_stages": 4, "FLATTEN": False}
TILE_ON_CPU = {"BLOCK_M": 16, "BLOCK_J": 16, "BLOCK_S": 16, "FLATTEN": False}
LARGEST_BLOCK = 4096


@triton.jit
def _swiglu_kernel(
    x_ptr,
    order_ptr,
    weight_desc,
    h_ptr,
    gate_up_ptr,
    ends_ptr,
    width,
    inputs,
    copies,
    GROUPS: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_E, tile_ends_E = group_tiles(ends_ptr, BLOCK_M, GROUPS, BLOCK_E)
    columns = tl.cdiv(width, BLOCK_J)
    total = tl.sum(tiles_E, axis=0) * columns
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        group, tile_m, tile_j = place_of(tile, tiles_E, tile_ends_E, columns, BAND, BLOCK_E)
        end = tl.load(ends_ptr + group)
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        column = tile_j * BLOCK_J
        row_M = start + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        copy_M = tl.load(order_ptr + row_M, mask=row_M < end, other=-1)
        here_M = copy_M >= 0  # neither another group's row nor a gap
        offset_S = tl.arange(0, BLOCK_S)
        x_ptr_MS = x_ptr + (tl.maximum(copy_M, 0) // copies).to(tl.int64)[:, None] * inputs + offset_S[None, :]
        sum_MJ = tl.zeros((BLOCK_M, 2 * BLOCK_J), dtype=tl.float32)
        for first in range(0, inputs, BLOCK_S):
            if EVEN:
                x_MS = tl.load(x_ptr_MS + first, mask=here_M[:, None], other=0.0)
            else:
                x_MS = tl.load(x_ptr_MS + first, mask=here_M[:, None] & (first + offset_S < inputs)[None, :], other=0.0)
            weight_JS = weight_desc.load([group, 0, column, first]).reshape(2 * BLOCK_J, BLOCK_S)
            sum_MJ = tl.dot(x_MS, weight_JS.T, sum_MJ)
        gate_MJ, up_MJ = tl.split(tl.permute(tl.reshape(sum_MJ, (BLOCK_M, 2, BLOCK_J)), (0, 2, 1)))
        gate_MJ, up_MJ = gate_MJ.to(h_ptr.dtype.element_ty), up_MJ.to(h_ptr.dtype.element_ty)
        column_J = column + tl.arange(0, BLOCK_J)
        inside_MJ = (row_M < end)[:, None] & (column_J < width)[None, :]
        row_M = row_M.to(tl.int64)
        if KEEP:
            kept_ptr_MJ = gate_up_ptr + row_M[:, None] * (2 * width) + column_J[None, :]
            tl.store(kept_ptr_MJ, gate_MJ, mask=inside_MJ)
            tl.store(kept_ptr_MJ + width, up_MJ, mask=inside_MJ)
        gate_MJ, up_MJ = gate_MJ.to(tl.float32), up_MJ.to(tl.float32)
        h_MJ = gate_MJ / (1.0 + tl.exp(-gate_MJ)) * up_MJ
        tl.store(h_ptr + row_M[:, None] * width + column_J[None, :], h_MJ.to(h_ptr.dtype.element_ty), mask=inside_MJ)


@triton.jit
def _activation_backward_kernel(grad_ptr, gate_up_ptr, grad_gate_up_ptr, width, BLOCK_I: tl.constexpr):
    # h = silu(g) · u: du = dh · silu(g), dg = dh · u · σ(g) · (1 + g · (1 − σ(g))).
    row = tl.program_id(0).to(tl.int64)
    column_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_I = column_I < width
    grad_I = tl.load(grad_ptr + row * width + column_I, mask=inside_I).to(tl.float32)
    gate_I = tl.load(gate_up_ptr + row * 2 * width + column_I, mask=inside_I).to(tl.float32)
    up_I = tl.load(gate_up_ptr + (row * 2 + 1) * width + column_I, mask=inside_I).to(tl.float32)
    sigmoid_I = 1.0 / (1.0 + tl.exp(-gate_I))
    grad_up_I = grad_I * gate_I * sigmoid_I
    grad_gate_I = grad_I * up_I * sigmoid_I * (1.0 + gate_I * (1.0 - sigmoid_I))
    out_ptr_I = grad_gate_up_ptr + row * 2 * width + column_I
    tl.store(out_ptr_I, grad_gate_I.to(grad_gate_up_ptr.dtype.element_ty), mask=inside_I)
    tl.store(out_ptr_I + width, grad_up_I.to(grad_gate_up_ptr.dtype.element_ty), mask=inside_I)


def _launch(
    x_TD: Tensor, gate_up_EID: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    groups, width, inputs = gate_up_EID.shape[0], gate_up_EID.shape[1] // 2, gate_up_EID.shape[2]
    rows = len(order_R)
    h_RI = torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device)
    kept_RI = torch.empty(rows if keep else 0, 2 * width, dtype=x_TD.dtype, device=x_TD.device)
    if not h_RI.numel() or not len(x_TD):
        return h_RI, kept_RI
    x_TD, gate_up_EID = operands(x_TD, gate_up_EID)
    if not x_TD.is_cuda:
        tile = TILE_ON_CPU
    elif rows <= FEW_ROWS * groups:
        tile = FEW_ROWS_TILE
    else:
        tile = TILE if inputs < LONG_SUM else LONG_SUM_TILE
    _swiglu_kernel[(programs(x_TD.device),)](
        x_TD,
        order_R,
        TensorDescriptor.from_tensor(
            gate_up_EID.view(groups, 2, width, inputs), [1, 2, tile["BLOCK_J"], tile["BLOCK_S"]]
        ),
        h_RI,
        kept_RI if keep else h_RI,
        ends_E,
        width,
        inputs,
        place_TK.shape[1],
        GROUPS=groups,
        KEEP=keep,
        EVEN=inputs % tile["BLOCK_S"] == 0,
        BAND=BAND,
        BLOCK_E=triton.next_power_of_2(groups),
        **tile,
    )
    return h_RI, kept_RI


_swiglu = Operation("grouped_swiglu", _launch)


@_swiglu.shapes
def _(
    x_TD: Tensor, gate_up_EID: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    rows, outputs = order_R.shape[0], gate_up_EID.shape[1]
    return x_TD.new_empty(rows, outputs // 2), x_TD.new_empty(rows if keep else 0, outputs)


def _launch_backward(grad_RI: Tensor, gate_up_RI: Tensor) -> Tensor:
    grad_gate_up_RI = torch.empty_like(gate_up_RI)
    rows, width = grad_RI.shape
    if grad_RI.numel():
        block = min(LARGEST_BLOCK, triton.next_power_of_2(width))
        _activation_backward_kernel[(rows, triton.cdiv(width, block))](
            grad_RI.contiguous(),
            gate_up_RI,
            grad_gate_up_RI,
            width,
            BLOCK_I=block,
            num_warps=min(8, max(1, block // 512)),
        )
    return grad_gate_up_RI


_activation_backward = Operation("swiglu_backward", _launch_backward)


@_activation_backward.shapes
def _(grad_RI: Tensor, gate_up_RI: Tensor) -> Tensor:
    return torch.empty_like(gate_up_RI)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_RI, _grad_kept):
    x_TD, gate_up_EID, order_R, place_TK, ends_E, kept_RI = ctx.saved_tensors
    grad_x_TD = grad_weight_EID = None
    if grad_RI is not None:
        grad_kept_RI = _activation_backward(grad_RI, kept_RI)
        if ctx.needs_input_grad[0]:
            grad_x_RD = rows_backward(grad_kept_RI, gate_up_EID, ends_E)
            grad_x_TD = sum_copies(grad_x_RD, order_R, place_TK)
        if ctx.needs_input_grad[1]:
            x_RD = permute(x_TD, order_R, place_TK)
            grad_weight_EID = weights_backward(grad_kept_RI, x_RD, ends_E)
    return grad_x_TD, grad_weight_EID, None, None, None, None


_swiglu.gradients(_gradients, _keep)


def grouped_swiglu(x_TD: Tensor, gate_up_EID: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ) of each row's own expert."""
    keep = torch.is_grad_enabled() and (x_TD.requires_grad or gate_up_EID.requires_grad)
    return _swiglu(x_TD, gate_up_EID, order_R, place_TK, ends_E, keep)[0]
