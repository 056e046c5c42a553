"""The product of block-scaled FP8 matrices as a Triton kernel.

A program owns a tile of 64 x 128 of the result. For each 128 of K the copy engine brings a tile of either operand, the
tensor cores multiply them, and their sums are scaled and added in float32 by the ordinary cores; the scales of the next
128 are fetched meanwhile. Three programs share a processor, so that one multiplies while another
one scales. Programs
that run at the same time work on neighbouring tiles, whose operands they find in the second-level cache.

Shapes: M and N rows of the operands, K what is summed over.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..fp8_layout import BLOCK, blocks
from ..fp8_rows.triton import INTERPRETED

TILE_M = 64
TILES_DOWN = 32  # neighbouring tiles: this many rows of them, column by column
WARPS = 4
STAGES = 3
MOST_REGISTERS = 168  # three programs of 128 threads on a processor


@triton.jit
def tile_of(number, tiles_m, tiles_n, TILES_DOWN: tl.constexpr):
    """Row and column of a tile: column by column within bands of TILES_DOWN rows."""
    band_tiles = TILES_DOWN * tiles_n
    band = number // band_tiles
    down = tl.minimum(tiles_m - band * TILES_DOWN, TILES_DOWN)
    return band * TILES_DOWN + number % band_tiles % down, number % band_tiles // down


@triton.jit
def sum_of_products(
    a_tiles,
    b_tiles,
    row_m,
    row_n,
    first,
    steps,
    a_scale_ptr_M,
    a_scale_stride,
    b_scale_ptr,
    b_scale_stride,
    B_ROWS: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Σ over `steps` blocks of 128 of K, from block `first`: (a · bᵀ) · scales, for tiles at rows row_m and row_n.

    a_scale_ptr_M points at the scales of the tile's rows in block 0; b_scale_ptr likewise, where b has row scales,
    else at the one scale of all rows.
    """
    sum_MN = tl.zeros((TILE_M, 128), dtype=tl.float32)
    a_scale_ptr_M += first * a_scale_stride
    b_scale_ptr += first * b_scale_stride
    a_scale_M = tl.load(a_scale_ptr_M)
    b_scale = tl.load(b_scale_ptr)
    for step in range(0, steps):
        a_MK = a_tiles.load([row_m, (first + step) * 128])
        b_NK = b_tiles.load([row_n, (first + step) * 128])
        ahead = tl.where(step + 1 < steps, 1, 0)
        a_scale_ptr_M += ahead * a_scale_stride
        b_scale_ptr += ahead * b_scale_stride
        next_a_scale_M = tl.load(a_scale_ptr_M)
        next_b_scale = tl.load(b_scale_ptr)
        if INTERPRETED:  # its tl.dot knows no FP8
            a_MK, b_NK = a_MK.to(tl.float32), b_NK.to(tl.float32)
        product_MN = tl.dot(a_MK, b_NK.T)
        if B_ROWS:
            sum_MN += product_MN * a_scale_M[:, None] * b_scale[None, :]
        else:
            sum_MN += product_MN * (a_scale_M * b_scale)[:, None]
        a_scale_M = next_a_scale_M
        b_scale = next_b_scale
    return sum_MN


@triton.jit
def _kernel(
    a_tiles,
    b_tiles,
    a_scale_ptr,
    b_scale_ptr,
    y_ptr,
    rows,
    outputs,
    inner,
    a_scale_stride,
    b_scale_row_stride,
    b_scale_stride,
    B_ROWS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILES_DOWN: tl.constexpr,
):
    m, n = tile_of(tl.program_id(0), tl.cdiv(rows, TILE_M), tl.cdiv(outputs, 128), TILES_DOWN)
    row_M = m * TILE_M + tl.arange(0, TILE_M)
    column_N = n * 128 + tl.arange(0, 128)
    if B_ROWS:
        b_scale_ptr += tl.minimum(column_N, outputs - 1) * b_scale_row_stride
    else:
        b_scale_ptr += n * b_scale_row_stride
    sum_MN = sum_of_products(
        a_tiles,
        b_tiles,
        m * TILE_M,
        n * 128,
        0,
        tl.cdiv(inner, 128),
        a_scale_ptr + tl.minimum(row_M, rows - 1),
        a_scale_stride,
        b_scale_ptr,
        b_scale_stride,
        B_ROWS,
        TILE_M,
    )
    tl.store(
        y_ptr + row_M.to(tl.int64)[:, None] * outputs + column_N[None, :],
        sum_MN.to(y_ptr.dtype.element_ty),
        mask=(row_M[:, None] < rows) & (column_N[None, :] < outputs),
    )


def tiles_of(values: Tensor, rows: int) -> TensorDescriptor:
    """The values for the copy engine, in tiles of `rows` x 128; zeros beyond the last row and column."""
    return TensorDescriptor(values, list(values.shape), list(values.stride()), [rows, BLOCK])


def _launch_product(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    (rows, inner), outputs = a_MK.shape, b_NK.shape[0]
    if not a_MK.numel() or not outputs:
        return torch.zeros(rows, outputs, dtype=dtype, device=a_MK.device)
    y_MN = torch.empty(rows, outputs, dtype=dtype, device=a_MK.device)
    _kernel[(triton.cdiv(rows, TILE_M) * blocks(outputs),)](
        tiles_of(a_MK, TILE_M),
        tiles_of(b_NK, BLOCK),
        a_scale_MV,
        b_scale,
        y_MN,
        rows,
        outputs,
        inner,
        a_scale_MV.stride(1),
        b_scale.stride(0),
        b_scale.stride(1),
        B_ROWS=b_scale.shape[0] == outputs,
        TILE_M=TILE_M,
        TILES_DOWN=TILES_DOWN,
        num_warps=WARPS,
        num_stages=STAGES,
        maxnreg=MOST_REGISTERS,
    )
    return y_MN


_product = torch.library.custom_op("deepwright::fp8_matmul_triton", _launch_product, mutates_args=())


@_product.register_fake
def _(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype, device=a_MK.device)


def fp8_matmul(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a · bᵀ, rounded once to `dtype`. b_scale: a row for each row of b, or for each 128 of them."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_product if torch.compiler.is_compiling() else _launch_product)(a_MK, a_scale_MV, b_NK, b_scale, dtype)
