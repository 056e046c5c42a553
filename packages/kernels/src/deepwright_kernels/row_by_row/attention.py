"""Attention of each query over its context in tiles of keys that begin at position 0, one after the other.

A query's tiles are the same whether it comes alone, in a chunk of a prompt or with one that is decoding, and a tile of
which it sees nothing changes none of its bits: weights are exactly 0, what was summed is multiplied by exactly 1.

The softmax is online (Milakov & Gimelshein 2018), in float32. Left out: caches in FP8.

Shapes: Z sequences and heads that share keys, X query rows, N positions, K key width, V value width; B sequences,
Q new tokens, H heads, G key/value heads, C latent, R rope key, W = C + R, P blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .elementwise import exp
from .products import rows

KEYS = 64  # of a tile


def attend(
    q_ZXK: Tensor,
    keys: Callable[[int, int], tuple[Tensor, Tensor]],
    context: int,
    first_ZX: Tensor,
    limit_ZX: Tensor,
    scale: float,
    width: int,
) -> Tensor:
    """softmax(scale · q kᵀ) v over the positions first <= n < limit of each row -> float32 [Z, X, V], V the width.

    keys(begin, end) gives k [Z, N, K] and v [Z, N, V] of a tile, in float32; anything beyond a limit, but no NaN.
    """
    exponential = torch.exp if q_ZXK.is_cuda else exp
    top_ZX1 = torch.full((*q_ZXK.shape[:2], 1), -torch.inf, device=q_ZXK.device)
    sum_ZX1 = torch.zeros_like(top_ZX1)
    out_ZXV = torch.zeros(*q_ZXK.shape[:2], width, device=q_ZXK.device)
    for begin in range(0, context, KEYS):
        k_ZNK, v_ZNV = keys(begin, begin + KEYS)
        index_N = torch.arange(begin, begin + KEYS, device=q_ZXK.device)
        seen_ZXN = (index_N >= first_ZX[..., None]) & (index_N < limit_ZX[..., None])
        score_ZXN = (rows(q_ZXK, k_ZNK.transpose(1, 2)) * scale).masked_fill(~seen_ZXN, -torch.inf)
        new_top_ZX1 = torch.maximum(top_ZX1, score_ZXN.amax(-1, keepdim=True))
        # A row that has seen nothing yet has top -inf; -inf minus -inf would be NaN.
        safe_ZX1 = new_top_ZX1.masked_fill(new_top_ZX1 == -torch.inf, 0.0)
        weight_ZXN = exponential(score_ZXN - safe_ZX1)
        shrink_ZX1 = exponential(top_ZX1 - safe_ZX1)
        top_ZX1 = new_top_ZX1
        sum_ZX1 = sum_ZX1 * shrink_ZX1 + _sum(weight_ZXN)
        out_ZXV = out_ZXV * shrink_ZX1 + rows(weight_ZXN, v_ZNV)
    return out_ZXV / sum_ZX1.masked_fill(sum_ZX1 == 0, 1.0)


def _sum(weight_ZXN: Tensor) -> Tensor:
    """Over the keys of a tile, in halves: torch's own sum chooses its order by the number of rows."""
    while weight_ZXN.shape[-1] > 1:
        left, right = weight_ZXN.chunk(2, -1)
        weight_ZXN = left + right
    return weight_ZXN


def _tile(context_BLW: Tensor, begin: int, end: int, lengths_B: Tensor) -> Tensor:
    """Float32, zeros beyond the lengths (a weight of zero does not silence a NaN) and beyond the tensor."""
    tile_BNW = context_BLW[:, begin:end].float()
    tile_BNW = functional.pad(tile_BNW, (0, 0) * (tile_BNW.ndim - 2) + (0, end - begin - tile_BNW.shape[1]))
    index_N = torch.arange(begin, end, device=lengths_B.device)
    beyond_BN = index_N >= lengths_B[:, None]
    return tile_BNW.masked_fill(beyond_BN.view(*beyond_BN.shape, *(1,) * (tile_BNW.ndim - 2)), 0.0)


def context_attention(
    q_BQHK: Tensor,
    expand: Callable[[int, int], tuple[Tensor, Tensor]],
    context: int,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    scale: float,
    starts_BQ: Tensor | None,
) -> Tensor:
    """out_BQHV in q's dtype."""
    if not q_BQHK.is_cuda and len(lengths_B):
        context = min(context, int(lengths_B.max()))
    queries, heads = q_BQHK.shape[1:3]
    k_BNGK, v_BNGV = expand(0, context)
    groups = k_BNGK.shape[2]
    # Row (q, h of group g): heads of one group share keys.
    q_ZXK = q_BQHK.float().unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def of_rows(value_BQ: Tensor) -> Tensor:
        return value_BQ.repeat_interleave(heads // groups, 1).repeat_interleave(groups, 0)

    def keys(begin: int, end: int) -> tuple[Tensor, Tensor]:
        k, v = (_tile(t, begin, end, lengths_B).transpose(1, 2).flatten(0, 1) for t in (k_BNGK, v_BNGV))
        return k, v

    limit_ZX = of_rows(torch.minimum(positions_BQ + 1, lengths_B[:, None]))
    first_ZX = torch.zeros_like(limit_ZX) if starts_BQ is None else of_rows(starts_BQ)
    with torch._C.DisableTorchFunction():
        out_ZXV = attend(q_ZXK, keys, max(context, 1), first_ZX, limit_ZX, scale, v_BNGV.shape[-1])
    out_BQHV = out_ZXV.unflatten(0, (-1, groups)).unflatten(2, (queries, -1)).transpose(1, 2).flatten(2, 3)
    return out_BQHV.to(q_BQHK.dtype)


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
    """out_BQHC in q_latent's dtype."""
    if cache_NW.dtype == torch.uint8:
        raise NotImplementedError("A cache in FP8 has no form for each row by itself; expected cache_dtype auto.")
    if q_latent_BQHC.is_cuda:
        from . import triton

        return triton.latent_attention(
            q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale
        )
    batch, queries, heads, latent = q_latent_BQHC.shape
    context = min(blocks_BP.shape[1] * block_size, max(1, int(lengths_B.max()) if batch else 1))
    width = cache_NW.shape[1]
    blocks = blocks_BP[:, : -(-context // block_size)]
    rows_BLW = cache_NW.view(-1, block_size, width)[blocks].flatten(1, 2)
    q_BXW = torch.cat((q_latent_BQHC, q_rope_BQHR), -1).float().flatten(1, 2)

    def keys(begin: int, end: int) -> tuple[Tensor, Tensor]:
        tile_BNW = _tile(rows_BLW, begin, end, lengths_B)
        return tile_BNW, tile_BNW[..., :latent].contiguous()

    limit_BX = torch.minimum(positions_BQ + 1, lengths_B[:, None]).repeat_interleave(heads, 1)
    out_BXC = attend(q_BXW, keys, context, torch.zeros_like(limit_BX), limit_BX, scale, latent)
    return out_BXC.unflatten(1, (queries, heads)).to(q_latent_BQHC.dtype)
