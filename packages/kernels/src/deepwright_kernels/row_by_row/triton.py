"""Products and latent attention in which no row knows of another, as Triton kernels.

A tile's sizes hang on the widths of the matrices and on their dtype, never on the number of rows; a program sums over
its inner dimension from the first to the last. So a row's bits are those of its tile's instruction, which treats all
rows alike. Sizes that change from call to call are not specialised: each pair of widths has one kernel.

Left out: splitting sums over processors, which would keep more of them busy when there are few rows.

Shapes: Z matrices, T rows, K inputs, N outputs, E groups, R rows in group order; tiles of M rows, J outputs and S of
the summed dimension. B sequences, Q new tokens of each, H heads, C latent, R rope key, X a tile of Q * H rows, L a tile
of keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouped_linear.triton import group_tiles

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["count"])
def _rows_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    count,
    outputs,
    inputs,
    x_stride_z,
    x_stride_t,
    w_stride_z,
    w_stride_k,
    w_stride_n,
    y_stride_z,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    matrix = tl.program_id(2).to(tl.int64)
    row_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_J = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    offset_S = tl.arange(0, BLOCK_S)
    x_ptr_MS = x_ptr + matrix * x_stride_z + row_M.to(tl.int64)[:, None] * x_stride_t + offset_S[None, :]
    w_ptr_SJ = w_ptr + matrix * w_stride_z + offset_S[:, None] * w_stride_k
    w_ptr_SJ += column_J.to(tl.int64)[None, :] * w_stride_n
    y_MJ = tl.zeros((BLOCK_M, BLOCK_J), dtype=tl.float32)
    for first in range(0, inputs, BLOCK_S):
        inside_S = first + offset_S < inputs
        x_MS = tl.load(x_ptr_MS, mask=(row_M < count)[:, None] & inside_S[None, :], other=0.0)
        w_SJ = tl.load(w_ptr_SJ, mask=inside_S[:, None] & (column_J < outputs)[None, :], other=0.0)
        y_MJ = tl.dot(x_MS, w_SJ, y_MJ, input_precision=PRECISION)
        x_ptr_MS += BLOCK_S
        w_ptr_SJ += BLOCK_S * w_stride_k
    tl.store(
        y_ptr + matrix * y_stride_z + row_M.to(tl.int64)[:, None] * outputs + column_J[None, :],
        y_MJ.to(y_ptr.dtype.element_ty),
        mask=(row_M < count)[:, None] & (column_J < outputs)[None, :],
    )


@triton.jit
def _grouped_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    ends_ptr,
    outputs,
    inputs,
    GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_E, tile_ends_E = group_tiles(ends_ptr, BLOCK_M, GROUPS, BLOCK_E)
    tile = tl.program_id(1)
    if tile < tl.sum(tiles_E, axis=0):
        group = tl.sum((tile_ends_E <= tile).to(tl.int32), axis=0)
        before = tl.sum(tl.where(tl.arange(0, BLOCK_E) == group, tile_ends_E - tiles_E, 0), axis=0)
        end = tl.load(ends_ptr + group)
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        row_M = start + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        column_J = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
        offset_S = tl.arange(0, BLOCK_S)
        x_ptr_MS = x_ptr + row_M.to(tl.int64)[:, None] * inputs + offset_S[None, :]
        w_ptr_SJ = weight_ptr + (group.to(tl.int64) * outputs + column_J)[None, :] * inputs + offset_S[:, None]
        y_MJ = tl.zeros((BLOCK_M, BLOCK_J), dtype=tl.float32)
        for first in range(0, inputs, BLOCK_S):
            inside_S = first + offset_S < inputs
            x_MS = tl.load(x_ptr_MS, mask=(row_M < end)[:, None] & inside_S[None, :], other=0.0)
            w_SJ = tl.load(w_ptr_SJ, mask=inside_S[:, None] & (column_J < outputs)[None, :], other=0.0)
            y_MJ = tl.dot(x_MS, w_SJ, y_MJ, input_precision=PRECISION)
            x_ptr_MS += BLOCK_S
            w_ptr_SJ += BLOCK_S
        tl.store(
            y_ptr + row_M.to(tl.int64)[:, None] * outputs + column_J[None, :],
            y_MJ.to(y_ptr.dtype.element_ty),
            mask=(row_M < end)[:, None] & (column_J < outputs)[None, :],
        )


def _tile(outputs: int, dtype: torch.dtype, cuda: bool) -> dict[str, int]:
    """By the width alone. Narrow matrices in narrow tiles: there are more of them to share among processors."""
    if not cuda:
        return {"BLOCK_M": 16, "BLOCK_J": 16, "BLOCK_S": 16}
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_J": 32, "BLOCK_S": 32, "num_warps": 4, "num_stages": 3}
    columns = 32 if outputs <= 4096 else 64 if outputs <= 16384 else 128
    return {"BLOCK_M": 64, "BLOCK_J": columns, "BLOCK_S": 128, "num_warps": 4, "num_stages": 4}


def _operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    # The interpreter's tl.dot multiplies the bits of bfloat16 as if they were integers.
    return tensors if tensors[0].is_cuda else tuple(tensor.float() for tensor in tensors)


def rows(x_ZTK: Tensor, w_ZKN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x_ZTK times w_ZKN -> [Z, T, N] in x's dtype, or in another (the sums are float32)."""
    matrices, count, inputs = x_ZTK.shape
    outputs = w_ZKN.shape[-1]
    y_ZTN = torch.empty(matrices, count, outputs, dtype=dtype or x_ZTK.dtype, device=x_ZTK.device)
    if not y_ZTN.numel():
        return y_ZTN
    x_ZTK, w_ZKN = _operands(x_ZTK, w_ZKN)
    if x_ZTK.stride(-1) != 1:
        x_ZTK = x_ZTK.contiguous()
    tile = _tile(outputs, x_ZTK.dtype, x_ZTK.is_cuda)
    grid = (triton.cdiv(outputs, tile["BLOCK_J"]), triton.cdiv(count, tile["BLOCK_M"]), matrices)
    _rows_kernel[grid](
        x_ZTK,
        w_ZKN,
        y_ZTN,
        count,
        outputs,
        inputs,
        x_ZTK.stride(0),
        x_ZTK.stride(1),
        *w_ZKN.stride(),
        y_ZTN.stride(0),
        PRECISION="ieee",
        **tile,
    )
    return y_ZTN


def grouped(x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """Row r of group e times weight_eᵀ; rows past the last end are zeros."""
    groups, outputs, inputs = weight_ENK.shape
    y_RN = torch.zeros(len(x_RK), outputs, dtype=x_RK.dtype, device=x_RK.device)
    if not y_RN.numel():
        return y_RN
    x_RK, weight_ENK = (tensor.contiguous() for tensor in _operands(x_RK, weight_ENK))
    tile = _tile(outputs, x_RK.dtype, x_RK.is_cuda)
    # Each group's last tile may be begun only; how many there are the host need not know.
    most = triton.cdiv(len(x_RK), tile["BLOCK_M"]) + groups
    _grouped_kernel[(triton.cdiv(outputs, tile["BLOCK_J"]), most)](
        x_RK,
        weight_ENK,
        y_RN,
        ends_E.contiguous(),
        outputs,
        inputs,
        GROUPS=groups,
        BLOCK_E=triton.next_power_of_2(groups),
        PRECISION="ieee",
        **tile,
    )
    return y_RN


@triton.jit(do_not_specialize=["blocks_stride", "queries"])
def _latent_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    blocks_ptr,
    positions_ptr,
    lengths_ptr,
    out_ptr,
    blocks_stride,
    queries,
    scale_log2,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    row_X = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    query_X = row_X // HEADS
    real_X = query_X < queries
    line_X = sequence * queries * HEADS + row_X
    column_C, column_R = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    inside_C, inside_R = column_C < LATENT, column_R < ROPE
    q_XC = tl.load(
        q_latent_ptr + line_X[:, None] * LATENT + column_C[None, :], mask=real_X[:, None] & inside_C[None, :], other=0.0
    )
    q_XR = tl.load(
        q_rope_ptr + line_X[:, None] * ROPE + column_R[None, :], mask=real_X[:, None] & inside_R[None, :], other=0.0
    )
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    position_X = tl.load(positions_ptr + sequence * queries + query_X, mask=real_X, other=-1).to(tl.int32)
    limit_X = tl.minimum(position_X + 1, length)
    top_X = tl.full((BLOCK_X,), float("-inf"), dtype=tl.float32)
    sum_X = tl.zeros((BLOCK_X,), dtype=tl.float32)
    out_XC = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
    for first in range(0, tl.max(limit_X, axis=0), BLOCK_L):
        key_L = first + tl.arange(0, BLOCK_L)
        cached_L = key_L < length
        block_L = tl.load(blocks_ptr + sequence * blocks_stride + key_L // BLOCK_SIZE, mask=cached_L, other=0)
        slot_L = block_L.to(tl.int64) * BLOCK_SIZE + key_L % BLOCK_SIZE
        start_L = cache_ptr + slot_L * (LATENT + ROPE)
        latent_LC = tl.load(
            start_L[:, None] + column_C[None, :], mask=cached_L[:, None] & inside_C[None, :], other=0.0
        ).to(q_XC.dtype)
        rope_LR = tl.load(
            start_L[:, None] + LATENT + column_R[None, :], mask=cached_L[:, None] & inside_R[None, :], other=0.0
        ).to(q_XR.dtype)
        score_XL = tl.dot(q_XR, tl.trans(rope_LR), input_precision=PRECISION)
        score_XL = tl.dot(q_XC, tl.trans(latent_LC), score_XL, input_precision=PRECISION) * scale_log2
        score_XL = tl.where(key_L[None, :] < limit_X[:, None], score_XL, float("-inf"))
        new_top_X = tl.maximum(top_X, tl.max(score_XL, axis=1))
        safe_X = tl.where(new_top_X == float("-inf"), 0.0, new_top_X)
        weight_XL = tl.exp2(score_XL - safe_X[:, None])
        shrink_X = tl.exp2(top_X - safe_X)
        top_X = new_top_X
        sum_X = sum_X * shrink_X + tl.sum(weight_XL, axis=1)
        mixed_XC = tl.dot(weight_XL.to(latent_LC.dtype), latent_LC, input_precision=PRECISION)
        out_XC = out_XC * shrink_X[:, None] + mixed_XC
    out_XC = out_XC / tl.where(sum_X == 0.0, 1.0, sum_X)[:, None]
    tl.store(
        out_ptr + line_X[:, None] * LATENT + column_C[None, :],
        out_XC.to(out_ptr.dtype.element_ty),
        mask=real_X[:, None] & inside_C[None, :],
    )


def latent_attention(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """softmax(scale · (q_latent · latent + q_rope · rope key)) · latent -> out_BQHC in q_latent's dtype.

    The (query, head) rows of a sequence are tiles one after the other, and a program walks over all keys of its tile.
    """
    batch, queries, heads, latent = q_latent_BQHC.shape
    out_BQHC = torch.empty(q_latent_BQHC.shape, dtype=q_latent_BQHC.dtype, device=q_latent_BQHC.device)
    if not out_BQHC.numel():
        return out_BQHC
    q_latent, q_rope, cache = (t.contiguous() for t in _operands(q_latent_BQHC, q_rope_BQHR, cache_NW))
    wide = q_latent.dtype == torch.float32
    _latent_kernel[(triton.cdiv(queries * heads, 16), batch)](
        q_latent,
        q_rope,
        cache,
        blocks_BP,
        positions_BQ.contiguous(),
        lengths_B.contiguous(),
        out_BQHC,
        blocks_BP.stride(0),
        queries,
        scale * LOG2_E,
        HEADS=heads,
        LATENT=latent,
        ROPE=q_rope.shape[-1],
        BLOCK_SIZE=block_size,
        BLOCK_X=16,
        BLOCK_L=16 if wide else 64,
        BLOCK_C=max(16, triton.next_power_of_2(latent)),
        BLOCK_R=max(16, triton.next_power_of_2(q_rope.shape[-1])),
        PRECISION="ieee",
        num_warps=4,
        num_stages=2,
    )
    return out_BQHC
