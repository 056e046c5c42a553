"""Newton-Schulz as two Triton kernels, the symmetric products at half their price.

Two of the three products of a step are symmetric, G = X·Xᵀ and G·G = G·Gᵀ. They have one form, A·Aᵀ, so one kernel
makes both: it computes the tiles on and below the diagonal and stores the others as transposed copies. The sum
b·G + c·G·G is its epilogue. The second kernel makes the product that is left, a·X + (b·G + c·G·G)·X.

A matrix with more rows than columns is worked on as it lies, with Xᵀ·X for X·Xᵀ and factors on the right: a tile is
transposed on its way into the matrix units, which costs nothing, where transposing the matrices would cost a tenth of
the whole. Tiles come in by TMA (of Hopper; elsewhere Triton makes ordinary loads of it), which wants rows that start at
multiples of 16 bytes.

Shapes: E matrices, M rows, N columns, S the shorter side of the two, L the longer; [I, J] a tile of a product, K its
depth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .reference import COEFFICIENTS, SMALLEST_NORM

NORM_BLOCK, NORM_BLOCKS = 2048, 8  # values of a load, and loads of a program that sums squares
# Rows and columns of a tile, depth of a step, warps and stages. G·G adds G in its epilogue, so long that two programs
# on a processor, with a stage less each, are faster; X·Xᵀ is deeper and wants the stage.
GRAM = (128, 128, 64, 4, 4)
SQUARE = (128, 128, 64, 4, 3)
UPDATE = (128, 256, 64, 8, 4)
ON_CPU = (16, 16, 16, 1, 1)  # the interpreter's tiles: small ones, so that small matrices have several


@triton.jit
def _square_sums_kernel(x_ptr, sums_ptr, values, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    matrix, piece = tl.program_id(1).to(tl.int64), tl.program_id(0)
    sum_V = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(BLOCKS):
        value_V = (piece * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        x_V = tl.load(x_ptr + matrix * values + value_V, mask=value_V < values, other=0.0).to(tl.float32)
        sum_V += x_V * x_V
    tl.store(sums_ptr + matrix * tl.num_programs(0) + piece, tl.sum(sum_V, axis=0))


@triton.jit
def _divide_kernel(x_ptr, norm_ptr, out_ptr, values, BLOCK: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    value_V = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_V = tl.load(x_ptr + matrix * values + value_V, mask=value_V < values, other=0.0).to(tl.float32)
    out_V = (x_V / tl.load(norm_ptr + matrix)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + matrix * values + value_V, out_V, mask=value_V < values)


@triton.jit
def _symmetric_kernel(
    left,
    right,
    a_ptr,
    out_ptr,
    size,
    depth,
    product_factor,
    a_factor,
    ADD: tl.constexpr,
    TALL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Square blocks of BLOCK_J rows hold BLOCK_J / BLOCK_I tiles. Block t of the lower triangle, counted along its rows,
    # is (row, j) with t = row (row + 1) / 2 + j. The root may round either way.
    HALVES: tl.constexpr = BLOCK_J // BLOCK_I
    block = tl.program_id(0) // HALVES
    row = ((tl.sqrt(8.0 * block + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > block, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= block, row + 1, row)
    j = block - row * (row + 1) // 2
    i = row * HALVES + tl.program_id(0) % HALVES
    matrix = tl.program_id(1)
    out_ptr += matrix.to(tl.int64) * size * size

    sum_IJ = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        if TALL:
            a_KI = left.load([matrix, start, i * BLOCK_I]).reshape(BLOCK_K, BLOCK_I)
            a_KJ = right.load([matrix, start, j * BLOCK_J]).reshape(BLOCK_K, BLOCK_J)
            sum_IJ = tl.dot(tl.trans(a_KI), a_KJ, acc=sum_IJ, input_precision=PRECISION)
        else:
            a_IK = left.load([matrix, i * BLOCK_I, start]).reshape(BLOCK_I, BLOCK_K)
            a_JK = right.load([matrix, j * BLOCK_J, start]).reshape(BLOCK_J, BLOCK_K)
            sum_IJ = tl.dot(a_IK, tl.trans(a_JK), acc=sum_IJ, input_precision=PRECISION)

    row_I, row_J = i * BLOCK_I + tl.arange(0, BLOCK_I), j * BLOCK_J + tl.arange(0, BLOCK_J)
    inside_IJ = (row_I < size)[:, None] & (row_J < size)[None, :]
    here_IJ = row_I[:, None] * size + row_J[None, :]
    sum_IJ *= product_factor
    if ADD:
        a_ptr += matrix.to(tl.int64) * size * size
        sum_IJ += a_factor * tl.load(a_ptr + here_IJ, mask=inside_IJ, other=0.0).to(tl.float32)
    out_IJ = sum_IJ.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + here_IJ, out_IJ, mask=inside_IJ)
    if row != j:
        tl.store(out_ptr + row_J[:, None] * size + row_I[None, :], tl.trans(out_IJ), mask=tl.trans(inside_IJ))


@triton.jit
def _update_kernel(
    left,
    right,
    x_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    x_factor,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles_J = tl.cdiv(columns, BLOCK_J)
    i, j = tl.program_id(0) // tiles_J, tl.program_id(0) % tiles_J
    matrix = tl.program_id(1)
    sum_IJ = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        left_IK = left.load([matrix, i * BLOCK_I, start]).reshape(BLOCK_I, BLOCK_K)
        right_KJ = right.load([matrix, start, j * BLOCK_J]).reshape(BLOCK_K, BLOCK_J)
        sum_IJ = tl.dot(left_IK, right_KJ, acc=sum_IJ, input_precision=PRECISION)

    row_I, column_J = i * BLOCK_I + tl.arange(0, BLOCK_I), j * BLOCK_J + tl.arange(0, BLOCK_J)
    inside_IJ = (row_I < rows)[:, None] & (column_J < columns)[None, :]
    here_IJ = matrix.to(tl.int64) * rows * columns + row_I[:, None] * columns + column_J[None, :]
    sum_IJ += x_factor * tl.load(x_ptr + here_IJ, mask=inside_IJ, other=0.0).to(tl.float32)
    tl.store(out_ptr + here_IJ, sum_IJ.to(out_ptr.dtype.element_ty), mask=inside_IJ)


def scaled(matrices_EMN: Tensor) -> Tensor:
    """Each matrix over its Frobenius norm, contiguous."""
    matrices_EMN = matrices_EMN.contiguous()
    out_EMN = torch.empty_like(matrices_EMN)
    count, values = len(matrices_EMN), matrices_EMN[0].numel()
    pieces = triton.cdiv(values, NORM_BLOCK * NORM_BLOCKS)
    sums_EP = torch.empty(count, pieces, dtype=torch.float32, device=matrices_EMN.device)
    _square_sums_kernel[(pieces, count)](matrices_EMN, sums_EP, values, BLOCK=NORM_BLOCK, BLOCKS=NORM_BLOCKS)
    norm_E = sums_EP.sum(1).sqrt_().add_(SMALLEST_NORM)
    _divide_kernel[(triton.cdiv(values, NORM_BLOCK), count)](matrices_EMN, norm_E, out_EMN, values, BLOCK=NORM_BLOCK)
    return out_EMN


def _tiles(matrices: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The matrices [E, M, N] as tiles of rows x columns, zeros beyond the edges."""
    return TensorDescriptor(matrices, list(matrices.shape), list(matrices.stride()), [1, rows, columns])


def _shape(matrices: Tensor, on_gpu: tuple[int, ...]) -> tuple[int, ...]:
    return on_gpu if matrices.is_cuda else ON_CPU


def _precision(matrices: Tensor) -> str:
    return "ieee" if matrices.dtype == torch.float32 else "tf32"


def symmetric_product(a_EMN: Tensor, product_factor: float, a_factor: float | None, out_EMM: Tensor) -> None:
    """out = product_factor · A·Aᵀ (Aᵀ·A where A has more rows than columns), + a_factor · A where A is symmetric.

    Contiguous matrices, out_EMM among them.
    """
    count, rows, columns = a_EMN.shape
    size, depth = min(rows, columns), max(rows, columns)
    block_i, block_j, block_k, warps, stages = _shape(a_EMN, GRAM if a_factor is None else SQUARE)
    tall = rows > columns
    blocks = triton.cdiv(size, block_j)
    _symmetric_kernel[(blocks * (blocks + 1) // 2 * (block_j // block_i), count)](
        _tiles(a_EMN, *((block_k, block_i) if tall else (block_i, block_k))),
        _tiles(a_EMN, *((block_k, block_j) if tall else (block_j, block_k))),
        a_EMN,
        out_EMM,
        size,
        depth,
        product_factor,
        0.0 if a_factor is None else a_factor,
        ADD=a_factor is not None,
        TALL=tall,
        PRECISION=_precision(a_EMN),
        BLOCK_I=block_i,
        BLOCK_J=block_j,
        BLOCK_K=block_k,
        STAGES=stages,
        num_warps=warps,
    )


def update(factor_ESS: Tensor, x_EMN: Tensor, x_factor: float, out_EMN: Tensor) -> None:
    """out = x_factor · X + F·X (X·F where X has more rows than columns) of contiguous matrices, F being symmetric."""
    count, rows, columns = x_EMN.shape
    block_i, block_j, block_k, warps, stages = _shape(x_EMN, UPDATE)
    left, right = (x_EMN, factor_ESS) if rows > columns else (factor_ESS, x_EMN)
    _update_kernel[(triton.cdiv(rows, block_i) * triton.cdiv(columns, block_j), count)](
        _tiles(left, block_i, block_k),
        _tiles(right, block_k, block_j),
        x_EMN,
        out_EMN,
        rows,
        columns,
        min(rows, columns),
        x_factor,
        PRECISION=_precision(x_EMN),
        BLOCK_I=block_i,
        BLOCK_J=block_j,
        BLOCK_K=block_k,
        STAGES=stages,
        num_warps=warps,
    )


@torch.library.custom_op("deepwright::newton_schulz", mutates_args=())
def _newton_schulz(matrices_EMN: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    if matrices_EMN.numel() == 0:
        return torch.empty_like(matrices_EMN)
    x_EMN = scaled(matrices_EMN)
    next_EMN = torch.empty_like(x_EMN)
    side = min(x_EMN.shape[1:])
    gram_ESS, factor_ESS = (x_EMN.new_empty(len(x_EMN), side, side) for _ in range(2))
    for _ in range(steps):
        symmetric_product(x_EMN, 1.0, None, gram_ESS)
        symmetric_product(gram_ESS, c, b, factor_ESS)
        update(factor_ESS, x_EMN, a, next_EMN)
        x_EMN, next_EMN = next_EMN, x_EMN
    return x_EMN


@_newton_schulz.register_fake
def _(matrices_EMN: Tensor, steps: int) -> Tensor:
    return torch.empty(matrices_EMN.shape, dtype=matrices_EMN.dtype, device=matrices_EMN.device)


def newton_schulz(matrices_EMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices, approximately: [E, M, N] in the input's dtype."""
    return _newton_schulz(matrices_EMN, steps)
