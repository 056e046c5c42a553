"""Absorbed decode over a paged latent cache in Triton: split along the keys, then combined ("flash decoding").

All (query, head) pairs of a sequence attend to the same keys, so a tile of keys is read once for a tile of such rows,
used for the scores and, its latent part, again as the values. The softmax is online (Milakov and Gimelshein 2018).

As many programs run as the GPU has room for, whatever the batch. The tiles of keys of all sequences stand in one row,
one sequence after the other, and every group of programs takes an equal share of that row: a part of a long sequence
or several short ones. The lengths are read on the device, so the host need not know them. A sequence that lies in one
group's share is finished there; of the others each group leaves a partial output in float32 with the logarithm of its
sum of weights, which a second kernel combines. Results do not change from run to run; but where a sequence is cut
depends on what runs beside it, and with that the last bits of its result.

Leaves out: products in FP8 (FP8 latents are widened to the queries' dtype first), and latents wider than 1024.

Shapes: B sequences, Q new tokens of each, H heads, X a tile of Q * H rows, K a tile of keys, C latent, R rope key,
S scales of a token's FP8 latents, V the latents of one scale, M partial outputs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import Operation
from .reference import SCALED_LATENTS

LOG2_E = 1.4426950408889634
# What a sequence costs a program beyond its tiles (its queries are loaded, the row of copies fills), in tiles.
OVERHEAD = tl.constexpr(2)


@triton.jit
def _tiles(lengths_ptr, sequence, capacity, mask, BLOCK_K: tl.constexpr):
    """Tiles of keys of a sequence, or of many; a length that the table of blocks cannot hold is cut."""
    length = tl.load(lengths_ptr + sequence, mask=mask, other=0).to(tl.int32)
    return tl.cdiv(tl.minimum(length, capacity), BLOCK_K)


@triton.jit
def _score(q_XC, q_XR, latent_KC, rope_KR, scale_log2, PRECISION: tl.constexpr):
    # Two products side by side, not one upon the other: the chain of dependent instructions is shorter.
    score_XK = tl.dot(q_XR, tl.trans(rope_KR), input_precision=PRECISION) * scale_log2
    return score_XK + tl.dot(q_XC, tl.trans(latent_KC), input_precision=PRECISION) * scale_log2


# Sizes that only the start of a program uses: a kernel for each kind of number would be compiled for nothing.
@triton.jit(do_not_specialize=["batch", "blocks_stride", "capacity", "groups", "row_tiles"])
def _part_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    blocks_ptr,
    positions_ptr,
    lengths_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    plan_ptr,
    batch,
    blocks_stride,
    q_latent_stride_b,
    q_latent_stride_q,
    q_latent_stride_h,
    q_rope_stride_b,
    q_rope_stride_q,
    q_rope_stride_h,
    capacity,
    scale_log2,
    groups,
    row_tiles,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    CACHE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FP8: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # From 64 rows on Triton gives the products to groups of four warps (wgmma); below, to single warps.
    WIDE: tl.constexpr = BLOCK_X >= 64
    # The output as [C, X]. See the second product.
    TURNED: tl.constexpr = WIDE and not FP8
    PAGED: tl.constexpr = BLOCK_SIZE % BLOCK_K == 0

    # Neighbours read the same keys for different rows: one of them finds them in the L2.
    group = tl.program_id(0) // row_tiles
    row_tile = tl.program_id(0) % row_tiles

    index_B = tl.arange(0, BLOCK_B)
    tiles_B = _tiles(lengths_ptr, index_B, capacity, index_B < batch, BLOCK_K)
    cost_B = tl.where(tiles_B > 0, tiles_B + OVERHEAD, 0)
    end_B = tl.cumsum(cost_B, axis=0)
    total = tl.sum(cost_B, axis=0)
    share = tl.cdiv(total, groups)
    # Equal shares save less than cutting costs where whole sequences, so many for each group, are nearly as even.
    each = tl.cdiv(batch, groups)
    whole = each * tl.max(cost_B, axis=0) * 16 <= share * 17
    # (A choice by `where`: after an `if` of scalars Triton 3.9 forgets how the cache is aligned.)
    before = tl.sum(tl.where(index_B < group * each, cost_B, 0), axis=0)
    after = tl.sum(tl.where(index_B < (group + 1) * each, cost_B, 0), axis=0)
    place = tl.where(whole, before, group * share)
    stop = tl.where(whole, after, tl.minimum(group * share + share, total))
    start = place
    if tl.program_id(0) == 0:
        tl.store(plan_ptr + index_B, end_B - cost_B, mask=index_B < batch)
        tl.store(plan_ptr + batch, tl.where(whole, total, share))
    sequence = tl.sum((end_B <= place).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(index_B < sequence, cost_B, 0), axis=0)

    row_X = row_tile * BLOCK_X + tl.arange(0, BLOCK_X)
    real_X = row_X < QUERIES * HEADS
    query_X = row_X // HEADS
    head_X = row_X % HEADS
    column_C = tl.arange(0, BLOCK_C)
    column_R = tl.arange(0, BLOCK_R)
    inside_C = column_C < LATENT
    inside_R = column_R < ROPE
    row_K = tl.arange(0, BLOCK_K)

    while place < stop:
        tiles = _tiles(lengths_ptr, sequence, capacity, sequence < batch, BLOCK_K)
        first = place - begin
        last = tl.minimum(tiles, stop - begin)
        if first < last:
            length = tl.minimum(tl.load(lengths_ptr + sequence).to(tl.int32), capacity)
            sequence_ = sequence.to(tl.int64)
            table_ptr = blocks_ptr + sequence_ * blocks_stride
            if PAGED:
                # One tile ahead of its use: the copies of a tile must not wait for the table.
                block = tl.load(table_ptr + first * BLOCK_K // BLOCK_SIZE)
            q_XC = tl.load(
                q_latent_ptr
                + sequence_ * q_latent_stride_b
                + (query_X * q_latent_stride_q + head_X * q_latent_stride_h)[:, None]
                + column_C[None, :],
                mask=real_X[:, None] & inside_C[None, :],
                other=0.0,
            )
            q_XR = tl.load(
                q_rope_ptr
                + sequence_ * q_rope_stride_b
                + (query_X * q_rope_stride_q + head_X * q_rope_stride_h)[:, None]
                + column_R[None, :],
                mask=real_X[:, None] & inside_R[None, :],
                other=0.0,
            )
            position_X = tl.load(positions_ptr + sequence_ * QUERIES + query_X, mask=real_X, other=-1).to(tl.int32)
            # A row sees the keys below its limit; below the lowest, every (real) row sees all.
            limit_X = tl.minimum(position_X + 1, length)
            lowest = tl.min(tl.where(real_X, limit_X, length), axis=0)

            top_X = tl.full((BLOCK_X,), float("-inf"), dtype=tl.float32)
            sum_XK = tl.zeros((BLOCK_X, BLOCK_K), dtype=tl.float32)  # added up at the end: each tile saves a reduction
            if TURNED:
                out_CX = tl.zeros((BLOCK_C, BLOCK_X), dtype=tl.float32)
            else:
                out_XC = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
            for tile in tl.range(first, last, num_stages=STAGES):
                key_K = tile * BLOCK_K + row_K
                cached_K = key_K < length
                if PAGED:
                    page = block.to(tl.int64) * BLOCK_SIZE + tile * BLOCK_K % BLOCK_SIZE
                    start_K = cache_ptr + page * CACHE_STRIDE + row_K * CACHE_STRIDE
                    block = tl.load(table_ptr + tl.minimum(tile + 1, last - 1) * BLOCK_K // BLOCK_SIZE)
                else:
                    block_K = tl.load(table_ptr + key_K // BLOCK_SIZE, mask=cached_K, other=0).to(tl.int64)
                    # Not (block_K * BLOCK_SIZE + key_K % BLOCK_SIZE) * CACHE_STRIDE: the compiler would take every row
                    # to be as well aligned as a block's first, and copy more bytes at once than may be.
                    start_K = cache_ptr + block_K * (BLOCK_SIZE * CACHE_STRIDE) + key_K % BLOCK_SIZE * CACHE_STRIDE
                if FP8:
                    value_KC = tl.load(
                        start_K.to(tl.pointer_type(tl.float8e4nv))[:, None] + column_C[None, :],
                        mask=cached_K[:, None] & inside_C[None, :],
                        other=0.0,
                    )
                    BLOCK_S: tl.constexpr = BLOCK_C // SCALED
                    column_S = tl.arange(0, BLOCK_S)
                    scale_KS = tl.load(
                        (start_K + LATENT).to(tl.pointer_type(tl.float32))[:, None] + column_S[None, :],
                        mask=cached_K[:, None] & (column_S < LATENT // SCALED)[None, :],
                        other=0.0,
                    )
                    value_KSV = tl.reshape(value_KC.to(tl.float32), (BLOCK_K, BLOCK_S, SCALED))
                    latent_KC = tl.reshape(value_KSV * scale_KS[:, :, None], (BLOCK_K, BLOCK_C)).to(tl.bfloat16)
                    rope_start_K = (start_K + LATENT + LATENT // SCALED * 4).to(tl.pointer_type(tl.bfloat16))
                else:
                    latent_KC = tl.load(
                        start_K[:, None] + column_C[None, :], mask=cached_K[:, None] & inside_C[None, :], other=0.0
                    )
                    rope_start_K = start_K + LATENT
                rope_KR = tl.load(
                    rope_start_K[:, None] + column_R[None, :], mask=cached_K[:, None] & inside_R[None, :], other=0.0
                ).to(q_XR.dtype)
                latent_KC = latent_KC.to(q_XC.dtype)
                if WIDE:
                    # The branch saves the mask, and more: where Triton sees the scores flow into the second product, it
                    # gives each warp whole rows, and with 64 rows two groups of warps would make the same scores.
                    if (tile + 1) * BLOCK_K <= lowest:
                        score_XK = _score(q_XC, q_XR, latent_KC, rope_KR, scale_log2, PRECISION)
                    else:
                        score_XK = _score(q_XC, q_XR, latent_KC, rope_KR, scale_log2, PRECISION)
                        score_XK = tl.where(key_K[None, :] < limit_X[:, None], score_XK, float("-inf"))
                else:
                    score_XK = _score(q_XC, q_XR, latent_KC, rope_KR, scale_log2, PRECISION)
                    score_XK = tl.where(key_K[None, :] < limit_X[:, None], score_XK, float("-inf"))

                new_top_X = tl.maximum(top_X, tl.max(score_XK, axis=1))
                # A row that has seen nothing yet has top -inf; -inf − -inf would be NaN.
                safe_top_X = tl.where(new_top_X == float("-inf"), 0.0, new_top_X)
                weight_XK = tl.exp2(score_XK - safe_top_X[:, None])
                shrink_X = tl.exp2(top_X - safe_top_X)
                top_X = new_top_X
                sum_XK = sum_XK * shrink_X[:, None] + weight_XK
                weight_XK = weight_XK.to(latent_KC.dtype)
                if TURNED:
                    # Both products then use the tile of latents by the same (transposed) view. Triton keeps a spare
                    # tile for operands that one wgmma alone reads, and shared memory has no room for a third.
                    out_CX = out_CX * shrink_X[None, :]
                    out_CX = tl.dot(tl.trans(latent_KC), tl.trans(weight_XK), acc=out_CX, input_precision=PRECISION)
                else:
                    out_XC = out_XC * shrink_X[:, None]
                    out_XC = tl.dot(weight_XK, latent_KC, acc=out_XC, input_precision=PRECISION)

            if TURNED:
                out_XC = tl.trans(out_CX)
            sum_X = tl.sum(sum_XK, axis=1)
            sum_X = tl.where(sum_X == 0.0, 1.0, sum_X)
            out_XC = out_XC / sum_X[:, None]
            if (first == 0) & (last == tiles):
                tl.store(
                    out_ptr + (sequence_ * QUERIES * HEADS + row_X)[:, None] * LATENT + column_C[None, :],
                    out_XC.to(out_ptr.dtype.element_ty),
                    mask=real_X[:, None] & inside_C[None, :],
                )
            else:
                # Of a group's share only the first and the last piece can belong to a sequence that was cut.
                part = group * 2 + (place != start).to(tl.int32)
                line_X = part.to(tl.int64) * row_tiles * BLOCK_X + row_X
                tl.store(
                    part_ptr + line_X[:, None] * LATENT + column_C[None, :],
                    out_XC,
                    mask=real_X[:, None] & inside_C[None, :],
                )
                tl.store(lse_ptr + line_X, top_X + tl.log2(sum_X), mask=real_X)
        if tiles > 0:
            begin += tiles + OVERHEAD
        place = begin
        sequence += 1


@triton.jit(do_not_specialize=["batch", "rows", "capacity", "part_rows"])
def _combine_kernel(
    part_ptr,
    lse_ptr,
    plan_ptr,
    lengths_ptr,
    out_ptr,
    batch,
    rows,
    capacity,
    part_rows,
    LATENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Joins the partial outputs of one row of a sequence that was cut. An empty sequence gives zeros."""
    sequence = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = column_C < LATENT
    tiles = _tiles(lengths_ptr, sequence, capacity, sequence < batch, BLOCK_K)
    begin = tl.load(plan_ptr + sequence)
    share = tl.maximum(tl.load(plan_ptr + batch), 1)
    first = begin // share
    last = (begin + tiles - 1) // share
    if (tiles == 0) | (first < last):
        top = float("-inf")
        sum = 0.0
        out_C = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for start in range(first, tl.where(tiles == 0, first, last + 1), BLOCK_M):
            group_M = start + tl.arange(0, BLOCK_M)
            here_M = group_M <= last
            part_M = group_M * 2 + ((group_M == first) & (begin != first * share)).to(tl.int32)
            line_M = part_M.to(tl.int64) * part_rows + row
            lse_M = tl.load(lse_ptr + line_M, mask=here_M, other=float("-inf"))
            part_MC = tl.load(
                part_ptr + line_M[:, None] * LATENT + column_C[None, :],
                mask=here_M[:, None] & inside_C[None, :],
                other=0.0,
            )
            new_top = tl.maximum(top, tl.max(lse_M, axis=0))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight_M = tl.exp2(lse_M - safe_top)
            shrink = tl.exp2(top - safe_top)
            sum = sum * shrink + tl.sum(weight_M, axis=0)
            out_C = out_C * shrink + tl.sum(weight_M[:, None] * part_MC, axis=0)
            top = new_top
        out_C = out_C / tl.where(sum == 0.0, 1.0, sum)
        line = tl.program_id(0).to(tl.int64)
        tl.store(out_ptr + line * LATENT + column_C, out_C.to(out_ptr.dtype.element_ty), mask=inside_C)


@cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter: enough to cut sequences in tests.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5


def _tile(rows: int, latent: int, rope: int, dtype: torch.dtype, fp8: bool) -> dict[str, int]:
    """Rows and keys of a tile, warps, and the depth of the row of copies, as an SM's shared memory allows."""
    if dtype == torch.float32 or latent > 512 or rope > 64:
        return {"BLOCK_X": 16, "BLOCK_K": 16, "num_warps": 8, "STAGES": 2}
    # FP8 latents are widened once for both products only where wgmma reads them from shared memory.
    if rows > 32 or fp8:
        return {"BLOCK_X": 64, "BLOCK_K": 64, "num_warps": 8, "STAGES": 3}
    if rows > 16:
        return {"BLOCK_X": 32, "BLOCK_K": 64, "num_warps": 8, "STAGES": 3}
    return {"BLOCK_X": 16, "BLOCK_K": 64, "num_warps": 4, "STAGES": 3}


def _launch(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    batch, queries, heads, latent = q_latent_BQHC.shape
    rope, rows = q_rope_BQHR.shape[-1], queries * heads
    device, dtype, fp8 = q_latent_BQHC.device, q_latent_BQHC.dtype, cache_NW.dtype == torch.uint8
    if q_latent_BQHC.numel() == 0:
        return torch.empty(q_latent_BQHC.shape, dtype=dtype, device=device)
    tile = _tile(rows, latent, rope, dtype, fp8)
    if device.type == "cpu":
        # The interpreter's tl.dot multiplies the bits of bfloat16 as if they were integers.
        q_latent_BQHC, q_rope_BQHR = q_latent_BQHC.float(), q_rope_BQHR.float()
        cache_NW = cache_NW if fp8 else cache_NW.float()
    out_BQHC = torch.empty(q_latent_BQHC.shape, dtype=q_latent_BQHC.dtype, device=device)
    blocks_BP, positions_BQ, lengths_B = blocks_BP.contiguous(), positions_BQ.contiguous(), lengths_B.contiguous()

    capacity = blocks_BP.shape[1] * block_size
    row_tiles = triton.cdiv(rows, tile["BLOCK_X"])
    part_rows = row_tiles * tile["BLOCK_X"]
    most = batch * triton.cdiv(capacity, tile["BLOCK_K"])
    groups = max(1, min(_multiprocessors(device) // row_tiles, most))
    part_MC = torch.empty((2 * groups * part_rows, latent), dtype=torch.float32, device=device)
    lse_M = torch.empty(2 * groups * part_rows, dtype=torch.float32, device=device)
    plan_B = torch.empty(batch + 1, dtype=torch.int32, device=device)
    _part_kernel[(groups * row_tiles,)](
        q_latent_BQHC,
        q_rope_BQHR,
        cache_NW,
        blocks_BP,
        positions_BQ,
        lengths_B,
        out_BQHC,
        part_MC,
        lse_M,
        plan_B,
        batch,
        blocks_BP.stride(0),
        *q_latent_BQHC.stride()[:3],
        *q_rope_BQHR.stride()[:3],
        capacity,
        scale * LOG2_E,  # the kernel works in powers of two
        groups,
        row_tiles,
        QUERIES=queries,
        HEADS=heads,
        LATENT=latent,
        ROPE=rope,
        CACHE_STRIDE=cache_NW.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK_B=max(128, triton.next_power_of_2(batch)),
        BLOCK_C=max(16, triton.next_power_of_2(latent)),
        BLOCK_R=max(16, triton.next_power_of_2(rope)),
        FP8=fp8,
        SCALED=SCALED_LATENTS,
        PRECISION="ieee" if dtype == torch.float32 else "tf32",
        num_stages=tile["STAGES"],
        **tile,
    )
    # As many pieces at once as a sequence is likely to have.
    pieces = max(4, min(64, triton.next_power_of_2(groups // batch + 2)))
    columns = min(triton.next_power_of_2(latent), 4096 // pieces)
    _combine_kernel[(batch * rows, triton.cdiv(latent, columns))](
        part_MC,
        lse_M,
        plan_B,
        lengths_B,
        out_BQHC,
        batch,
        rows,
        capacity,
        part_rows,
        LATENT=latent,
        BLOCK_K=tile["BLOCK_K"],
        BLOCK_M=pieces,
        BLOCK_C=columns,
        num_warps=2,
    )
    return out_BQHC.to(dtype)


_decode = Operation("mla_paged_decode", _launch)


@_decode.shapes
def _(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    return torch.empty(q_latent_BQHC.shape, dtype=q_latent_BQHC.dtype, device=q_latent_BQHC.device)


def mla_paged_decode(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """See the operator's docstring."""
    out_BQHC: Tensor = _decode(
        q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale
    )
    return out_BQHC
