"""Rotary position embedding as one Triton kernel; the backward pass is the same kernel, turning the other way.

A program turns a few rows. It loads pairs side by side and separates them in registers, so memory is read in order.
Strides stand for broadcasting: cos and sin are not copied, and x may be a slice of a wider tensor.

Shapes: T rows, R the rotated dimension, F = R / 2 pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_PROGRAM = 2048
LEADING = 3


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    rows,
    width,
    size_1,
    size_2,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    angle_stride_0,
    angle_stride_1,
    angle_stride_2,
    angle_stride_pair,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    index_2_T = row_T % size_2
    index_1_T = (row_T // size_2) % size_1
    index_0_T = row_T // (size_2 * size_1)
    column_R = tl.arange(0, 2 * BLOCK_F)
    pair_F = tl.arange(0, BLOCK_F)
    inside_TR = (row_T < rows)[:, None] & (column_R < width)[None, :]
    inside_TF = (row_T < rows)[:, None] & (2 * pair_F < width)[None, :]

    start_T = index_0_T * x_stride_0 + index_1_T * x_stride_1 + index_2_T * x_stride_2
    x_TR = tl.load(x_ptr + start_T[:, None] + column_R[None, :], mask=inside_TR, other=0.0).to(tl.float32)
    even_TF, odd_TF = tl.split(tl.reshape(x_TR, (BLOCK_T, BLOCK_F, 2)))

    angle_T = index_0_T * angle_stride_0 + index_1_T * angle_stride_1 + index_2_T * angle_stride_2
    angle_TF = angle_T[:, None] + (pair_F * angle_stride_pair)[None, :]
    cos_TF = tl.load(cos_ptr + angle_TF, mask=inside_TF, other=0.0).to(tl.float32)
    sin_TF = tl.load(sin_ptr + angle_TF, mask=inside_TF, other=0.0).to(tl.float32)
    if INVERSE:
        sin_TF = -sin_TF

    y_TF2 = tl.join(even_TF * cos_TF - odd_TF * sin_TF, even_TF * sin_TF + odd_TF * cos_TF)
    y_TR = tl.reshape(y_TF2, (BLOCK_T, 2 * BLOCK_F))
    tl.store(y_ptr + row_T[:, None] * width + column_R[None, :], y_TR.to(y_ptr.dtype.element_ty), mask=inside_TR)


def _three_leading(tensor: Tensor) -> Tensor:
    """The tensor with exactly three leading dimensions; a copy only when strides cannot say it."""
    if tensor.ndim - 1 < LEADING:
        return tensor[(None,) * (LEADING + 1 - tensor.ndim)]
    return tensor.reshape(-1, *tensor.shape[-LEADING:])


@torch.library.custom_op("deepwright::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    width = x.shape[-1]
    angles_shape = (*x.shape[:-1], width // 2)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    x_3R = _three_leading(x if x.stride(-1) == 1 else x.contiguous())
    cos_3F, sin_3F = (_three_leading(angle.expand(angles_shape)) for angle in (cos, sin))
    rows = x.numel() // width
    block_pairs = triton.next_power_of_2(width // 2)
    block_rows = max(1, min(VALUES_PER_PROGRAM // (2 * block_pairs), triton.next_power_of_2(rows)))
    _kernel[(triton.cdiv(rows, block_rows),)](
        x_3R,
        cos_3F,
        sin_3F,
        y,
        rows,
        width,
        x_3R.shape[1],
        x_3R.shape[2],
        *x_3R.stride()[:LEADING],
        *cos_3F.stride(),
        INVERSE=inverse,
        BLOCK_T=block_rows,
        BLOCK_F=block_pairs,
        num_warps=4,
    )
    return y


@_rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx, inputs, output) -> None:
    _x, cos, sin, inverse = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _gradients(ctx, grad):
    cos, sin = ctx.saved_tensors
    return _rotary(grad, cos, sin, not ctx.inverse), None, None, None


_rotary.register_autograd(_gradients, setup_context=_keep)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., R], cos and sin broadcastable to [..., R/2] -> [..., R] in x's dtype."""
    return _rotary(x, cos, sin, False)
