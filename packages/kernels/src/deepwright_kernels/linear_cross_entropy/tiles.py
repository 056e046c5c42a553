"""Products of hidden states and a head's weight whose tiles are used before they leave the SM (Triton, with the copy
engine of Hopper GPUs).

A persistent program works on one tile of logits after another and does with it, in registers, what would otherwise be
another pass over memory: `reduce` keeps of each row of a tile its log-partition and its entropy, and `combine` merges
those of a row's tiles; `gradient` turns the tile into its gradient. On a GPU that is held back by its power, as a
Hopper GPU is by long products, that costs no time: the product alone takes as long.

Leaves out: everything that does not lie at multiples of 16 bytes, and float32 products (but in the interpreter).

Shapes: K tokens, D hidden size, C columns (a slice of the vocabulary), N tiles across a row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
ALIGNMENT_BYTES = 16
# A warpgroup takes 64 rows of the tile; tiles that follow each other share their rows of the weight in the L2.
BLOCK_K, BLOCK_C, BLOCK_D, GROUP = 128, 256, 64, 16


@triton.jit
def _place(tile, tiles_down, tiles_across, GROUP: tl.constexpr):
    """(down, across) of a tile: `GROUP` tiles down, then the next column of them."""
    group = tile // (GROUP * tiles_across)
    first = group * GROUP
    size = min(tiles_down - first, GROUP)
    within = tile % (GROUP * tiles_across)
    return first + within % size, within // size


@triton.jit
def _product(
    hidden,
    weight,
    row,
    column,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    logit_KC = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        hidden_KD = hidden.load([row, start])
        weight_CD = weight.load([column, start])
        logit_KC = tl.dot(hidden_KD, weight_CD.T, logit_KC, input_precision="ieee")
    return logit_KC.to(hidden.dtype)


@triton.jit
def _reduce_kernel(
    hidden,
    weight,
    targets_ptr,
    partition_ptr,
    entropy_ptr,
    chosen_ptr,
    rows,
    columns,
    first_column,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # Everything is in powers of two.
    tiles_down, tiles_across = tl.cdiv(rows, BLOCK_K), tl.cdiv(columns, BLOCK_C)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, PROGRAMS, flatten=True):
        down, across = _place(tile, tiles_down, tiles_across, GROUP)
        narrow_KC = _product(hidden, weight, down * BLOCK_K, across * BLOCK_C, WIDTH, BLOCK_K, BLOCK_C, BLOCK_D)
        row_K = down * BLOCK_K + tl.arange(0, BLOCK_K)
        column_C = across * BLOCK_C + tl.arange(0, BLOCK_C)
        real_K, real_C = row_K < rows, column_C < columns
        logit_KC = tl.where(real_C[None, :], narrow_KC.to(tl.float32) * scale_log2, float("-inf"))
        here_K = (tl.load(targets_ptr + row_K, mask=real_K, other=-1) - first_column).to(tl.int32)
        chosen_K = tl.sum(tl.where(column_C[None, :] == here_K[:, None], logit_KC, 0.0), axis=1)
        in_tile_K = (here_K >= across * BLOCK_C) & (here_K < min(columns, (across + 1) * BLOCK_C))
        tl.store(chosen_ptr + row_K, chosen_K, mask=real_K & in_tile_K)
        top_K = tl.max(logit_KC, axis=1)
        shifted_KC = logit_KC - top_K[:, None]
        exp_KC = tl.exp2(shifted_KC)
        total_K = tl.sum(exp_KC, axis=1)
        log_total_K = tl.log2(total_K)
        place_K = across.to(tl.int64) * rows + row_K
        tl.store(partition_ptr + place_K, top_K + log_total_K, mask=real_K)
        weighted_K = tl.sum(exp_KC * tl.where(real_C[None, :], shifted_KC, 0.0), axis=1)
        tl.store(entropy_ptr + place_K, log_total_K - weighted_K / total_K, mask=real_K)


@triton.jit
def _combine_kernel(
    partitions_ptr,
    entropies_ptr,
    chosen_ptr,
    targets_ptr,
    partition_ptr,
    loss_ptr,
    entropy_ptr,
    rows,
    tiles,
    ignore_index,
    LN_2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # With w the share of a tile in the whole partition sum, H = Σ w (H_tile − log w).
    row_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    real_K = row_K < rows
    top_K = tl.full((BLOCK_K,), float("-inf"), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_N):
        tile_N = start + tl.arange(0, BLOCK_N)
        mask_NK = (tile_N < tiles)[:, None] & real_K[None, :]
        place_NK = tile_N[:, None].to(tl.int64) * rows + row_K[None, :]
        top_K = tl.maximum(top_K, tl.max(tl.load(partitions_ptr + place_NK, mask=mask_NK, other=float("-inf")), axis=0))
    top_K = tl.where(real_K, top_K, 0.0)
    total_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    weighted_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_N):
        tile_N = start + tl.arange(0, BLOCK_N)
        mask_NK = (tile_N < tiles)[:, None] & real_K[None, :]
        place_NK = tile_N[:, None].to(tl.int64) * rows + row_K[None, :]
        shifted_NK = tl.load(partitions_ptr + place_NK, mask=mask_NK, other=float("-inf")) - top_K[None, :]
        exp_NK = tl.exp2(shifted_NK)
        total_K += tl.sum(exp_NK, axis=0)
        entropy_NK = tl.load(entropies_ptr + place_NK, mask=mask_NK, other=0.0)
        weighted_K += tl.sum(exp_NK * (entropy_NK - tl.where(mask_NK, shifted_NK, 0.0)), axis=0)
    total_K = tl.where(real_K, total_K, 1.0)
    log_total_K = tl.log2(total_K)
    partition_K = top_K + log_total_K
    ignored_K = tl.load(targets_ptr + row_K, mask=real_K, other=0) == ignore_index
    chosen_K = tl.load(chosen_ptr + row_K, mask=real_K, other=0.0)
    tl.store(partition_ptr + row_K, partition_K, mask=real_K)
    tl.store(loss_ptr + row_K, tl.where(ignored_K, 0.0, (partition_K - chosen_K) * LN_2), mask=real_K)
    entropy_K = (log_total_K + weighted_K / total_K) * LN_2
    tl.store(entropy_ptr + row_K, tl.where(ignored_K, 0.0, entropy_K), mask=real_K)


@triton.jit
def _gradient_kernel(
    hidden,
    weight,
    gradient,
    targets_ptr,
    partition_ptr,
    upstream_ptr,
    rows,
    columns,
    first_column,
    ignore_index,
    scale_log2,
    inverse_temperature,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(rows, BLOCK_K), tl.cdiv(columns, BLOCK_C)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, PROGRAMS, flatten=True):
        down, across = _place(tile, tiles_down, tiles_across, GROUP)
        narrow_KC = _product(hidden, weight, down * BLOCK_K, across * BLOCK_C, WIDTH, BLOCK_K, BLOCK_C, BLOCK_D)
        row_K = down * BLOCK_K + tl.arange(0, BLOCK_K)
        column_C = across * BLOCK_C + tl.arange(0, BLOCK_C)
        real_K = row_K < rows
        target_K = tl.load(targets_ptr + row_K, mask=real_K, other=0)
        partition_K = tl.load(partition_ptr + row_K, mask=real_K, other=0.0)
        upstream_K = tl.load(upstream_ptr + row_K, mask=real_K, other=0.0).to(tl.float32)
        scale_K = tl.where(target_K == ignore_index, 0.0, upstream_K * inverse_temperature)
        share_KC = tl.exp2(narrow_KC.to(tl.float32) * scale_log2 - partition_K[:, None])
        here_K = (target_K - first_column).to(tl.int32)
        gradient_KC = (share_KC - tl.where(column_C[None, :] == here_K[:, None], 1.0, 0.0)) * scale_K[:, None]
        gradient.store([down * BLOCK_K, across * BLOCK_C], gradient_KC.to(narrow_KC.dtype))


def fit(hidden_TD: Tensor, weight_VD: Tensor) -> bool:
    """Whether these operands (and slices of the weight, cast to hidden's dtype) can be multiplied here."""
    if hidden_TD.shape[1] * hidden_TD.itemsize % ALIGNMENT_BYTES or not hidden_TD.numel():
        return False
    if any(t.stride(1) != 1 or t.stride(0) * t.itemsize % ALIGNMENT_BYTES for t in (hidden_TD, weight_VD)):
        return False
    if any(t.data_ptr() % ALIGNMENT_BYTES for t in (hidden_TD, weight_VD)):
        return False
    if not hidden_TD.is_cuda:
        return hidden_TD.dtype == torch.float32  # the interpreter's tl.dot takes bfloat16 for integers
    narrow = hidden_TD.dtype in (torch.bfloat16, torch.float16)
    return narrow and torch.cuda.get_device_capability(hidden_TD.device)[0] >= 9


def across(columns: int) -> int:
    """Tiles across a row."""
    return triton.cdiv(columns, BLOCK_C)


def reduce(
    hidden_KD: Tensor,
    weight_CD: Tensor,
    targets_K: Tensor,
    first_column: int,
    temperature: float,
    partitions_NK: Tensor,
    entropies_NK: Tensor,
    chosen_K: Tensor,
) -> None:
    """Log-partition and entropy (in powers of two) of each tile's rows, and the targets' logits where they are here."""
    rows, columns = len(hidden_KD), len(weight_CD)
    programs = _programs(rows, columns, hidden_KD)
    _reduce_kernel[(programs,)](
        _tiles_of(hidden_KD, BLOCK_K),
        _tiles_of(weight_CD, BLOCK_C),
        targets_K,
        partitions_NK,
        entropies_NK,
        chosen_K,
        rows,
        columns,
        first_column,
        LOG2_E / temperature,
        WIDTH=hidden_KD.shape[1],
        **_configuration(programs),
    )


def combine(
    partitions_NK: Tensor,
    entropies_NK: Tensor,
    chosen_K: Tensor,
    targets_K: Tensor,
    ignore_index: int,
    partition_K: Tensor,
    loss_K: Tensor,
    entropy_K: Tensor,
) -> None:
    """The log-partition (in powers of two), loss and entropy of each row from what its tiles have left."""
    tiles, rows = partitions_NK.shape
    _combine_kernel[(triton.cdiv(rows, 32),)](
        partitions_NK,
        entropies_NK,
        chosen_K,
        targets_K,
        partition_K,
        loss_K,
        entropy_K,
        rows,
        tiles,
        ignore_index,
        LN_2,
        BLOCK_K=32,
        BLOCK_N=32,
        num_warps=4,
    )


def gradient(
    hidden_KD: Tensor,
    weight_CD: Tensor,
    targets_K: Tensor,
    first_column: int,
    ignore_index: int,
    temperature: float,
    partition_K: Tensor,
    upstream_K: Tensor,
    gradient_KC: Tensor,
) -> None:
    """(softmax − one-hot) · upstream / temperature of this slice of the vocabulary; zeros where tokens are ignored."""
    rows, columns = len(hidden_KD), len(weight_CD)
    programs = _programs(rows, columns, hidden_KD)
    _gradient_kernel[(programs,)](
        _tiles_of(hidden_KD, BLOCK_K),
        _tiles_of(weight_CD, BLOCK_C),
        TensorDescriptor.from_tensor(gradient_KC, [BLOCK_K, BLOCK_C]),
        targets_K,
        partition_K,
        upstream_K,
        rows,
        columns,
        first_column,
        ignore_index,
        LOG2_E / temperature,
        1 / temperature,
        WIDTH=hidden_KD.shape[1],
        **_configuration(programs),
    )


def _tiles_of(matrix: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK_D])


def _programs(rows: int, columns: int, like: Tensor) -> int:
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 2
    return min(processors, triton.cdiv(rows, BLOCK_K) * across(columns))


def _configuration(programs: int) -> dict[str, int]:
    return {
        "BLOCK_K": BLOCK_K,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": BLOCK_D,
        "GROUP": GROUP,
        "PROGRAMS": programs,
        "num_warps": 8,
        "num_stages": 3,
    }
