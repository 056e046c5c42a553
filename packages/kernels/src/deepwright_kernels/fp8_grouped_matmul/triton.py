"""A block-scaled FP8 product for each group of rows as a Triton kernel, made of the tiles of fp8_matmul's.

Groups begin at multiples of 128 rows, so a tile belongs to one group: the one whose number is how many
groups end at or before the tile's first row. Programs count that themselves; the host need not know the ends. Tiles
after the last end are filled with zeros.

Shapes: T rows, E groups, N outputs, K what is summed over.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_layout import BLOCK, blocks
from ..fp8_matmul.triton import MOST_REGISTERS, STAGES, TILE_M, TILES_DOWN, WARPS, sum_of_products, tile_of, tiles_of


@triton.jit
def _kernel(
    a_tiles,
    b_tiles,
    a_scale_ptr,
    b_scale_ptr,
    ends_ptr,
    y_ptr,
    groups,
    rows,
    outputs,
    inner,
    a_scale_stride,
    GROUPS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILES_DOWN: tl.constexpr,
):
    m, n = tile_of(tl.program_id(0), tl.cdiv(rows, TILE_M), tl.cdiv(outputs, 128), TILES_DOWN)
    row_M = m * TILE_M + tl.arange(0, TILE_M)
    column_N = n * 128 + tl.arange(0, 128)
    y_ptr_MN = y_ptr + row_M.to(tl.int64)[:, None] * outputs + column_N[None, :]
    inside_MN = (row_M[:, None] < rows) & (column_N[None, :] < outputs)
    group_E = tl.arange(0, GROUPS)
    end_E = tl.load(ends_ptr + group_E, mask=group_E < groups, other=0x7FFFFFFF)
    group = tl.sum((end_E <= m * TILE_M).to(tl.int32), axis=0)
    if group == groups:
        tl.store(y_ptr_MN, tl.zeros((TILE_M, 128), dtype=y_ptr.dtype.element_ty), mask=inside_MN)
    else:
        blocks_k = tl.cdiv(inner, 128)
        sum_MN = sum_of_products(
            a_tiles,
            b_tiles,
            m * TILE_M,
            group * outputs + n * 128,
            0,
            blocks_k,
            a_scale_ptr + tl.minimum(row_M, rows - 1),
            a_scale_stride,
            b_scale_ptr + (group * tl.cdiv(outputs, 128) + n) * blocks_k,
            1,
            False,
            TILE_M,
        )
        tl.store(y_ptr_MN, sum_MN.to(y_ptr.dtype.element_ty), mask=inside_MN)


def _launch_product(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    rows, (groups, outputs, inner) = a_TK.shape[0], b_ENK.shape
    if not a_TK.numel() or not b_ENK.numel():
        return torch.zeros(rows, outputs, dtype=dtype, device=a_TK.device)
    y_TN = torch.empty(rows, outputs, dtype=dtype, device=a_TK.device)
    _kernel[(triton.cdiv(rows, TILE_M) * blocks(outputs),)](
        tiles_of(a_TK, TILE_M),
        # One matrix under the other: what a tile has of the next one goes to columns that are not stored.
        tiles_of(b_ENK.contiguous().view(groups * outputs, inner), BLOCK),
        a_scale_TV,
        b_scale_EUV,
        ends_E,
        y_TN,
        groups,
        rows,
        outputs,
        inner,
        a_scale_TV.stride(1),
        GROUPS=triton.next_power_of_2(groups),
        TILE_M=TILE_M,
        TILES_DOWN=TILES_DOWN,
        num_warps=WARPS,
        num_stages=STAGES,
        maxnreg=MOST_REGISTERS,
    )
    return y_TN


_product = torch.library.custom_op("deepwright::fp8_grouped_matmul_triton", _launch_product, mutates_args=())


@_product.register_fake
def _(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty(a_TK.shape[0], b_ENK.shape[1], dtype=dtype, device=a_TK.device)


def fp8_grouped_matmul(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Row t of group e becomes a_t · b_eᵀ. Rows after the last end become zero."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_product if torch.compiler.is_compiling() else _launch_product)(
        a_TK, a_scale_TV, b_ENK, b_scale_EUV, ends_E, dtype
    )
