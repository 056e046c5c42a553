"""Newton-Schulz with the symmetric products as one Triton kernel: half of the tiles, both halves written.

Two of the three products of a step are symmetric, X·Xᵀ and G·G = G·Gᵀ. They have the same form, A·Aᵀ, so one kernel
makes both; it computes the tiles on and below the diagonal and stores each of the others as a transposed copy. The sum
b·G + c·G·G is its epilogue. The third product, a·X + (b·G + c·G·G)·X, is torch's.

Shapes: E matrices, M rows, N columns, M the shorter side; of a symmetric product, [I, J] a tile and K its depth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_sums import scaled_wide
from .reference import COEFFICIENTS

# (rows and columns of a tile, depth of a step, warps, stages): of the H200's sweep.
TILE, DEPTH, WARPS, STAGES = 128, 64, 4, 4
TILE_ON_CPU, DEPTH_ON_CPU = 16, 16


@triton.jit
def _kernel(
    a_ptr,
    out_ptr,
    rows,
    depth,
    product_factor,
    a_factor,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Tile t of the lower triangle, counted along its rows: t = i (i + 1) / 2 + j. The root may round either way.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    a_ptr += matrix * rows * depth
    out_ptr += matrix * rows * rows

    row_I, row_J, column_K = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    inside_I, inside_J = row_I < rows, row_J < rows
    a_IK = a_ptr + row_I[:, None] * depth + column_K[None, :]
    a_JK = a_ptr + row_J[:, None] * depth + column_K[None, :]
    sum_IJ = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        left = (column_K < depth - start)[None, :]
        values_IK = tl.load(a_IK + start, mask=inside_I[:, None] & left, other=0.0)
        values_JK = tl.load(a_JK + start, mask=inside_J[:, None] & left, other=0.0)
        sum_IJ = tl.dot(values_IK, tl.trans(values_JK), acc=sum_IJ, input_precision=PRECISION)

    inside_IJ = inside_I[:, None] & inside_J[None, :]
    sum_IJ *= product_factor
    if ADD:
        added_IJ = tl.load(a_ptr + row_I[:, None] * depth + row_J[None, :], mask=inside_IJ, other=0.0)
        sum_IJ += a_factor * added_IJ.to(tl.float32)
    out_IJ = sum_IJ.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_I[:, None] * rows + row_J[None, :], out_IJ, mask=inside_IJ)
    if i != j:
        tl.store(out_ptr + row_J[:, None] * rows + row_I[None, :], tl.trans(out_IJ), mask=tl.trans(inside_IJ))


def symmetric_product(a_EMN: Tensor, product_factor: float, a_factor: float | None) -> Tensor:
    """product_factor · A·Aᵀ (+ a_factor · A, where A is itself symmetric) of contiguous matrices: [E, M, M]."""
    count, rows, depth = a_EMN.shape
    out_EMM = torch.empty(count, rows, rows, dtype=a_EMN.dtype, device=a_EMN.device)
    if out_EMM.numel() == 0:
        return out_EMM
    on_gpu = a_EMN.is_cuda
    # The interpreter's tl.dot multiplies the bits of bfloat16 as if they were integers.
    a_EMN = a_EMN if on_gpu else a_EMN.float()
    block, block_depth = (TILE, DEPTH) if on_gpu else (TILE_ON_CPU, DEPTH_ON_CPU)
    side = triton.cdiv(rows, block)
    _kernel[(side * (side + 1) // 2, count)](
        a_EMN,
        out_EMM,
        rows,
        depth,
        product_factor,
        0.0 if a_factor is None else a_factor,
        ADD=a_factor is not None,
        PRECISION="ieee" if a_EMN.dtype == torch.float32 else "tf32",
        BLOCK=block,
        BLOCK_K=block_depth,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return out_EMM


@torch.library.custom_op("deepwright::newton_schulz", mutates_args=())
def _newton_schulz(matrices_EMN: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    x_EMN, tall = scaled_wide(matrices_EMN)
    for _ in range(steps):
        gram_EMM = symmetric_product(x_EMN, 1.0, None)
        factor_EMM = symmetric_product(gram_EMM, c, b)
        x_EMN = torch.baddbmm(x_EMN, factor_EMM, x_EMN, beta=a)
    return x_EMN.mT if tall else x_EMN


@_newton_schulz.register_fake
def _(matrices_EMN: Tensor, steps: int) -> Tensor:
    wide = matrices_EMN.shape[-2] <= matrices_EMN.shape[-1]
    like = matrices_EMN if wide else matrices_EMN.mT
    x_EMN = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return x_EMN if wide else x_EMN.mT


def newton_schulz(matrices_EMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices, approximately: [E, M, N] in the input's dtype."""
    return _newton_schulz(matrices_EMN, steps)
