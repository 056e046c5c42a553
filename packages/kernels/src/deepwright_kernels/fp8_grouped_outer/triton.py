"""Products summed over the tokens of each group as a Triton kernel: the tiles of fp8_matmul's, over a group's blocks.

A program owns a tile of one group's result and walks over that group's tokens, 128 at a time; an empty group's tiles
come out as zeros. Every sum is made by one program in the order of the tokens, so results do not change run to run.

Shapes: M and N rows of the operands, T tokens, E groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_layout import BLOCK, blocks
from ..fp8_matmul.triton import (
    MOST_REGISTERS,
    STAGES,
    TILE_M,
    TILES_DOWN,
    WARPS,
    sum_of_products,
    tile_of,
    tiles_of,
)

STORES = ".cs"  # written once and not read again here: leaves the second-level cache to the operands


@triton.jit
def _kernel(
    a_tiles,
    b_tiles,
    a_scale_ptr,
    b_scale_ptr,
    ends_ptr,
    y_ptr,
    rows,
    outputs,
    a_scale_stride,
    b_scale_stride,
    TILE_M: tl.constexpr,
    TILES_DOWN: tl.constexpr,
    STORES: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(outputs, 128)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    m, n = tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, TILES_DOWN)
    row_M = m * TILE_M + tl.arange(0, TILE_M)
    column_N = n * 128 + tl.arange(0, 128)
    begin = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    sum_MN = tl.zeros((TILE_M, 128), dtype=tl.float32)
    if end > begin:
        sum_MN = sum_of_products(
            a_tiles,
            b_tiles,
            m * TILE_M,
            n * 128,
            begin // 128,
            (end - begin) // 128,
            a_scale_ptr + tl.minimum(row_M, rows - 1),
            a_scale_stride,
            b_scale_ptr + tl.minimum(column_N, outputs - 1),
            b_scale_stride,
            True,
            TILE_M,
        )
    tl.store(
        y_ptr + (group.to(tl.int64) * rows + row_M)[:, None] * outputs + column_N[None, :],
        sum_MN.to(y_ptr.dtype.element_ty),
        mask=(row_M[:, None] < rows) & (column_N[None, :] < outputs),
        cache_modifier=STORES,
    )


def _launch_product(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    groups, rows, outputs = ends_E.shape[0], a_MT.shape[0], b_NT.shape[0]
    if not a_MT.numel() or not b_NT.numel():
        return torch.zeros(groups, rows, outputs, dtype=dtype, device=a_MT.device)
    y_EMN = torch.empty(groups, rows, outputs, dtype=dtype, device=a_MT.device)
    if groups:
        _kernel[(groups * triton.cdiv(rows, TILE_M) * blocks(outputs),)](
            tiles_of(a_MT, TILE_M),
            tiles_of(b_NT, BLOCK),
            a_scale_MV,
            b_scale_NV,
            ends_E,
            y_EMN,
            rows,
            outputs,
            a_scale_MV.stride(1),
            b_scale_NV.stride(1),
            TILE_M=TILE_M,
            TILES_DOWN=TILES_DOWN,
            STORES=STORES,
            num_warps=WARPS,
            num_stages=STAGES,
            maxnreg=MOST_REGISTERS,
        )
    return y_EMN


_product = torch.library.custom_op("deepwright::fp8_grouped_outer_triton", _launch_product, mutates_args=())


@_product.register_fake
def _(a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(ends_E.shape[0], a_MT.shape[0], b_NT.shape[0], dtype=dtype, device=a_MT.device)


def fp8_grouped_outer(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """y_e = a_e · b_eᵀ over the columns of group e; zeros for an empty one."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_product if torch.compiler.is_compiling() else _launch_product)(
        a_MT, a_scale_MV, b_NT, b_scale_NV, ends_E, dtype
    )
