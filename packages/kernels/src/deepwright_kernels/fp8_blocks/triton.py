"""Quantising weights in blocks of 128 x 128 as a Triton kernel: a program owns a block and reads it once.

Leaves out: blocks of other sizes, which only checkpoints of other models have.

Shapes: E matrices of a stack, N rows, K columns, U = ⌈N/128⌉ and V = ⌈K/128⌉ blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_layout import BLOCK, blocks
from ..fp8_rows.triton import absolute_bits, rows_at_once, scale_of, to_e4m3, tokens_of, transpose

WARPS = 8


@triton.jit
def _blocks_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    rows,
    columns,
    x_matrix_stride,
    x_stride,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    down, across = tl.cdiv(rows, 128), tl.cdiv(columns, 128)
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    u = tl.program_id(0) // across % down
    v = tl.program_id(0) % across
    row_N = tokens_of(u, ROWS)
    column_K = v * 128 + tl.arange(0, 128)
    inside_NK = (row_N[:, None] < rows) & (column_K[None, :] < columns)
    x_NK = tl.load(
        x_ptr + matrix * x_matrix_stride + row_N.to(tl.int64)[:, None] * x_stride + column_K[None, :],
        mask=inside_NK,
        other=0.0,
    ).to(tl.float32)
    scale = scale_of(tl.max(tl.max(absolute_bits(x_NK), axis=1), axis=0), POWER_OF_TWO)
    values_NK = to_e4m3(x_NK * tl.div_rn(1.0, scale))
    values_ptr += matrix * rows * columns
    scale_ptr += matrix * down * across
    if TRANSPOSED:
        ordered_N = u * 128 + tl.arange(0, 128)
        tl.store(
            values_ptr + column_K.to(tl.int64)[:, None] * rows + ordered_N[None, :],
            transpose(values_NK, ROWS),
            mask=(column_K[:, None] < columns) & (ordered_N[None, :] < rows),
        )
        tl.store(scale_ptr + v * down + u, scale)
    else:
        tl.store(values_ptr + row_N.to(tl.int64)[:, None] * columns + column_K[None, :], values_NK, mask=inside_NK)
        tl.store(scale_ptr + u * across + v, scale)


def _empty(x_ENK: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    *matrices, rows, columns = x_ENK.shape
    if transposed:
        rows, columns = columns, rows
    return (
        torch.empty(*matrices, rows, columns, dtype=torch.float8_e4m3fn, device=x_ENK.device),
        torch.empty(*matrices, blocks(rows), blocks(columns), dtype=torch.float32, device=x_ENK.device),
    )


def _launch_quantise(x_ENK: Tensor, power_of_two_scales: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    values, scale = _empty(x_ENK, transposed)
    if x_ENK.numel():
        x_ENK = x_ENK if x_ENK.stride(-1) == 1 else x_ENK.contiguous()
        rows, columns = x_ENK.shape[-2:]
        _blocks_kernel[(scale.numel(),)](
            x_ENK,
            values,
            scale,
            rows,
            columns,
            x_ENK.stride(0) if x_ENK.ndim == 3 else 0,
            x_ENK.stride(-2),
            TRANSPOSED=transposed,
            ROWS=rows_at_once(x_ENK, BLOCK, WARPS),
            POWER_OF_TWO=power_of_two_scales,
            num_warps=WARPS,
        )
    return values, scale


_quantise = torch.library.custom_op("deepwright::quantise_fp8_blocks", _launch_quantise, mutates_args=())


@_quantise.register_fake
def _(x_ENK: Tensor, power_of_two_scales: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    return _empty(x_ENK, transposed)


def quantise_fp8_blocks(
    x_NK: Tensor, block: tuple[int, int], power_of_two_scales: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Values [N, K] and scales [U, V], of a stack those of each matrix; or their transposes. `block` is (128, 128)."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_quantise if torch.compiler.is_compiling() else _launch_quantise)(x_NK, power_of_two_scales, transposed)
