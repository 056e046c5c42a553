"""Rotary position embedding as one Triton kernel; the backward pass is the same kernel, turning the other way.

A program takes all of a token's heads (or, of few heads, several tokens), so that an angle is loaded once for them.
It loads pairs side by side and separates them in registers, so memory is read in order. What stands before the rotated
part of a head is copied along by `rotary_tail`. Strides stand for broadcasting: cos and sin are not copied, and x may
be a slice of a wider tensor.

Shapes: T tokens (of two leading dimensions), H heads, R the rotated dimension, F = R / 2 pairs, P what stands before
it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS, MOST_VALUES = 128, 32768  # of a program: (token, head) pairs, and their values
LEADING = 3


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    tokens,
    size_1,
    heads,
    kept,
    rotated,
    x_stride_0,
    x_stride_1,
    x_stride_head,
    angle_stride_0,
    angle_stride_1,
    angle_stride_head,
    angle_stride_pair,
    INVERSE: tl.constexpr,
    ANGLE_PER_HEAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    index_0_T, index_1_T = token_T // size_1, token_T % size_1
    real_T, real_H = token_T < tokens, head_H < heads
    real_TH1 = (real_T[:, None] & real_H[None, :])[:, :, None]
    width = kept + rotated
    x_TH1 = x_ptr + ((index_0_T * x_stride_0 + index_1_T * x_stride_1)[:, None] + head_H * x_stride_head)[:, :, None]
    y_TH1 = y_ptr + ((token_T * heads * width)[:, None] + head_H * width)[:, :, None]

    if BLOCK_P:
        column_P = tl.arange(0, BLOCK_P)[None, None, :]
        inside_THP = real_TH1 & (column_P < kept)
        tl.store(y_TH1 + column_P, tl.load(x_TH1 + column_P, mask=inside_THP, other=0.0), mask=inside_THP)

    column_R = tl.arange(0, 2 * BLOCK_F)[None, None, :]
    inside_THR = real_TH1 & (column_R < rotated)
    x_THR = tl.load(x_TH1 + (kept + column_R), mask=inside_THR, other=0.0).to(tl.float32)
    even_THF, odd_THF = tl.split(tl.reshape(x_THR, (BLOCK_T, BLOCK_H, BLOCK_F, 2)))

    pair_F = tl.arange(0, BLOCK_F)[None, None, :]
    angle_T11 = (index_0_T * angle_stride_0 + index_1_T * angle_stride_1)[:, None, None]
    angle_THF = angle_T11 + pair_F * angle_stride_pair
    known_THF = real_T[:, None, None] & (2 * pair_F < rotated)
    if ANGLE_PER_HEAD:
        angle_THF += (head_H * angle_stride_head)[None, :, None]
        known_THF = known_THF & real_H[None, :, None]
    cos_THF = tl.load(cos_ptr + angle_THF, mask=known_THF, other=0.0).to(tl.float32)
    sin_THF = tl.load(sin_ptr + angle_THF, mask=known_THF, other=0.0).to(tl.float32)
    if INVERSE:
        sin_THF = -sin_THF

    y_THF2 = tl.join(even_THF * cos_THF - odd_THF * sin_THF, even_THF * sin_THF + odd_THF * cos_THF)
    y_THR = tl.reshape(y_THF2, (BLOCK_T, BLOCK_H, 2 * BLOCK_F))
    tl.store(y_TH1 + (kept + column_R), y_THR.to(y_ptr.dtype.element_ty), mask=inside_THR)


def _four_dimensions(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """The tensor, broadcast to more than three leading dimensions, with three; a copy if strides cannot say it."""
    return tensor.expand(*leading, tensor.shape[-1]).reshape(-1, *leading[1 - LEADING :], tensor.shape[-1])


def _leading_strides(tensor: Tensor) -> tuple[int, ...]:
    """Of exactly three leading dimensions, 0 for those that are broadcast or not there."""
    strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return (0,) * (LEADING + 1 - tensor.ndim) + tuple(0 if size == 1 else stride for size, stride in strides)


def _power_of_two(size: int) -> int:
    """The first not below; triton's own functions for this and for rounding up take a host 2 µs each."""
    return 1 << (size - 1).bit_length()


def _launch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    width, pairs = x.shape[-1], cos.shape[-1]
    kept = width - 2 * pairs
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.ndim > LEADING + 1:
        leading = x.shape[:-1]
        x, cos, sin = (_four_dimensions(tensor, leading) for tensor in (x, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    size_0, size_1, heads = (1,) * (LEADING + 1 - x.ndim) + tuple(x.shape[:-1])
    angle_strides = _leading_strides(cos)
    tokens = size_0 * size_1
    block_pairs = _power_of_two(pairs)
    block_kept = _power_of_two(kept) if kept else 0
    # All of a token's heads at once where they fit: on an H200 the slices of 128 heads of 192 go from 3.6 to 3.9 TB/s.
    fitting = MOST_VALUES // (2 * block_pairs + block_kept)
    rows = min(MOST_ROWS, 1 << max(0, fitting.bit_length() - 1))
    block_heads = min(_power_of_two(heads), rows)
    block_tokens = min(_power_of_two(tokens), rows // block_heads)
    values = _power_of_two(block_tokens * block_heads * (2 * block_pairs + block_kept))
    _kernel[(-(-tokens // block_tokens), -(-heads // block_heads))](
        x,
        cos,
        sin,
        y,
        tokens,
        size_1,
        heads,
        kept,
        2 * pairs,
        *_leading_strides(x),
        *angle_strides,
        cos.stride(-1),
        INVERSE=inverse,
        ANGLE_PER_HEAD=angle_strides[-1] != 0,
        BLOCK_T=block_tokens,
        BLOCK_H=block_heads,
        BLOCK_F=block_pairs,
        BLOCK_P=block_kept,
        num_warps=min(16, max(1, values // 1024)),
    )
    return y


@torch.library.custom_op("deepwright::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return _launch(x, cos, sin, inverse)


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


class _Rotary(torch.autograd.Function):
    """The same without the operator around it, whose dispatch takes a host longer than the kernel does a GPU."""

    @staticmethod
    def forward(ctx, x, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _launch(x, cos, sin, inverse)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, not ctx.inverse), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    if torch.compiler.is_compiling():
        return _rotary(x, cos, sin, inverse)
    if x.requires_grad and torch.is_grad_enabled():
        return _Rotary.apply(x, cos, sin, inverse)
    return _launch(x, cos, sin, inverse)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., R], cos and sin broadcastable to [..., R/2] -> [..., R] in x's dtype."""
    return _turn(x, cos, sin, False)


def rotary_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., P + R], cos and sin broadcastable to [..., R/2] -> x with its last R values turned."""
    return _turn(x, cos, sin, False)
