"""Absorbed decode over a paged latent cache as one Triton kernel.

A program owns one sequence and a tile of its (query, head) pairs, which all attend to the same keys: a tile of keys
is loaded once for the whole tile of queries, used for the scores and, its latent part, again as the values. The
softmax is online (Milakov and Gimelshein 2018). Keys beyond the length are never loaded.

Leaves out: splitting a long sequence over several programs. With few sequences and few heads most of a GPU idles.

Shapes: B sequences, Q new tokens of each, H heads, X a tile of Q * H rows, K a tile of keys, C latent, R rope key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    blocks_ptr,
    positions_ptr,
    lengths_ptr,
    out_ptr,
    queries,
    heads,
    latent,
    rope,
    blocks_stride,
    cache_stride,
    block_size,
    scale_log2,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    row_X = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    real_X = row_X < queries * heads
    column_C = tl.arange(0, BLOCK_C)
    column_R = tl.arange(0, BLOCK_R)
    inside_C = column_C < latent
    inside_R = column_R < rope

    first = sequence * queries * heads
    q_XC = tl.load(
        q_latent_ptr + (first + row_X)[:, None] * latent + column_C[None, :],
        mask=real_X[:, None] & inside_C[None, :],
        other=0.0,
    )
    q_XR = tl.load(
        q_rope_ptr + (first + row_X)[:, None] * rope + column_R[None, :],
        mask=real_X[:, None] & inside_R[None, :],
        other=0.0,
    )
    position_X = tl.load(positions_ptr + sequence * queries + row_X // heads, mask=real_X, other=-1)
    length = tl.load(lengths_ptr + sequence)
    end = tl.minimum(length, tl.max(position_X, axis=0) + 1)

    top_X = tl.full((BLOCK_X,), float("-inf"), dtype=tl.float32)
    sum_X = tl.zeros((BLOCK_X,), dtype=tl.float32)
    out_XC = tl.zeros((BLOCK_X, BLOCK_C), dtype=tl.float32)
    for start in range(0, end, BLOCK_K):
        key_K = start + tl.arange(0, BLOCK_K)
        cached_K = key_K < end
        block_K = tl.load(blocks_ptr + sequence * blocks_stride + key_K // block_size, mask=cached_K, other=0)
        slot_K = block_K.to(tl.int64) * block_size + key_K % block_size
        row_ptr_K = cache_ptr + slot_K * cache_stride
        latent_KC = tl.load(
            row_ptr_K[:, None] + column_C[None, :], mask=cached_K[:, None] & inside_C[None, :], other=0.0
        ).to(q_XC.dtype)
        rope_KR = tl.load(
            row_ptr_K[:, None] + latent + column_R[None, :], mask=cached_K[:, None] & inside_R[None, :], other=0.0
        ).to(q_XC.dtype)
        score_XK = tl.dot(q_XC, tl.trans(latent_KC), input_precision=PRECISION)
        score_XK = tl.dot(q_XR, tl.trans(rope_KR), acc=score_XK, input_precision=PRECISION)
        seen_XK = cached_K[None, :] & (key_K[None, :] <= position_X[:, None])
        score_XK = tl.where(seen_XK, score_XK * scale_log2, float("-inf"))

        new_top_X = tl.maximum(top_X, tl.max(score_XK, axis=1))
        # A row that has seen nothing yet has top -inf; -inf − -inf would be NaN.
        safe_top_X = tl.where(new_top_X == float("-inf"), 0.0, new_top_X)
        weight_XK = tl.exp2(score_XK - safe_top_X[:, None])
        shrink_X = tl.exp2(top_X - safe_top_X)
        sum_X = sum_X * shrink_X + tl.sum(weight_XK, axis=1)
        out_XC = tl.dot(
            weight_XK.to(latent_KC.dtype), latent_KC, acc=out_XC * shrink_X[:, None], input_precision=PRECISION
        )
        top_X = new_top_X
    out_XC = out_XC / tl.where(sum_X == 0.0, 1.0, sum_X)[:, None]
    tl.store(
        out_ptr + (first + row_X)[:, None] * latent + column_C[None, :],
        out_XC.to(out_ptr.dtype.element_ty),
        mask=real_X[:, None] & inside_C[None, :],
    )


@torch.library.custom_op("deepwright::mla_paged_decode", mutates_args=())
def _decode(
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
    rope = q_rope_BQHR.shape[-1]
    out_BQHC = torch.empty(q_latent_BQHC.shape, dtype=q_latent_BQHC.dtype, device=q_latent_BQHC.device)
    if out_BQHC.numel() == 0:
        return out_BQHC
    if not out_BQHC.is_cuda:
        # The interpreter's tl.dot multiplies the bits of bfloat16 as if they were integers.
        q_latent_BQHC, q_rope_BQHR, cache_NW = q_latent_BQHC.float(), q_rope_BQHR.float(), cache_NW.float()
    rows = queries * heads
    wide = q_latent_BQHC.dtype == torch.float32
    # tl.dot takes tiles of at least 16. Tiles are as large as an SM's shared memory lets a 512-wide latent be.
    block_rows = min(64, max(16, triton.next_power_of_2(rows)))
    _kernel[(batch, triton.cdiv(rows, block_rows))](
        q_latent_BQHC.contiguous(),
        q_rope_BQHR.contiguous(),
        cache_NW if cache_NW.stride(-1) == 1 else cache_NW.contiguous(),
        blocks_BP.contiguous(),
        positions_BQ.contiguous(),
        lengths_B.contiguous(),
        out_BQHC,
        queries,
        heads,
        latent,
        rope,
        blocks_BP.shape[1],
        cache_NW.stride(0),
        block_size,
        scale * 1.4426950408889634,  # log2(e): the kernel works in powers of two
        BLOCK_X=block_rows,
        BLOCK_K=16 if wide else 32,
        BLOCK_C=max(16, triton.next_power_of_2(latent)),
        BLOCK_R=max(16, triton.next_power_of_2(rope)),
        PRECISION="ieee" if wide else "tf32",
        num_warps=8,
        num_stages=2,
    )
    return out_BQHC


@_decode.register_fake
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
    return _decode(q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale)
