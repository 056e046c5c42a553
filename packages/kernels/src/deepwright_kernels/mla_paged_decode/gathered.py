"""Absorbed decode on a CPU: blocks are gathered whole, and torch's fused attention takes the heads for queries.

Values are the whole rows of the cache, rope keys included, because the fused kernel wants keys and values of one width;
the result's last R columns are cut off.

What is cached beyond a length may be NaN, which a weight of zero does not silence. The reference clears it before the
products, a pass over all keys; here the (far smaller) result is asked whether it is finite, and only where it is not
does the reference do the work again.

Leaves out GPUs, whose host would have to wait for the answer, and caches in FP8.

Shapes: B sequences, Q new tokens of each, H heads, C latent, R rope key, W = C + R cache width, N cache slots, P blocks
of the longest sequence, K = P * block_size keys, X = Q * H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from . import reference


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
    """softmax(scale · (q_latent · latent + q_rope · rope key)) · latent -> out_BQHC in q_latent's dtype."""
    batch, queries, heads, latent = q_latent_BQHC.shape
    wide = torch.promote_types(q_latent_BQHC.dtype, torch.float32)
    width, keys = cache_NW.shape[1], blocks_BP.shape[1] * block_size
    rows_BKW = functional.embedding(blocks_BP, cache_NW.view(-1, block_size * width)).to(wide)
    rows_B1KW = rows_BKW.view(batch, 1, keys, width)
    q_B1XW = torch.cat((q_latent_BQHC, q_rope_BQHR), dim=-1).to(wide).view(batch, 1, queries * heads, width)
    last_BQ = torch.minimum(positions_BQ, lengths_B[:, None] - 1)
    seen_B1QK = (torch.arange(keys) <= last_BQ[:, :, None])[:, None]
    seen_B1XK = seen_B1QK if queries == 1 else seen_B1QK.repeat_interleave(heads, dim=2)
    mixed_B1XW = functional.scaled_dot_product_attention(q_B1XW, rows_B1KW, rows_B1KW, seen_B1XK, scale=scale)
    out_BXC = mixed_B1XW[:, 0, :, :latent]
    if not math.isfinite(out_BXC.sum().item()):
        return reference.mla_paged_decode(
            q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale
        )
    return out_BXC.to(q_latent_BQHC.dtype).unflatten(1, (queries, heads))
