"""Absorbed decode of multi-head latent attention over a paged cache, in plain torch (DeepSeek-V2, section 2.1).

With the up-projections absorbed into query and output, every head attends to the same keys: the latent vector and
the shared rope key of each token. The values are the latents themselves. A query sees the keys up to its own
position that lie inside its sequence's length; what stands in the cache beyond the length, NaN included, is not read.

Shapes: B sequences, Q new tokens of each, H heads, C latent, R rope key, W = C + R cache width, N cache slots,
P blocks of the longest sequence, K = P * block_size keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
    index_K = torch.arange(blocks_BP.shape[1] * block_size, device=cache_NW.device)
    slots_BK = (blocks_BP[:, :, None] * block_size + index_K[:block_size]).flatten(1)
    beyond_BK = index_K >= lengths_B[:, None]
    hidden_BQK = (index_K > positions_BQ[:, :, None]) | beyond_BK[:, None]

    keys_BKW = functional.embedding(slots_BK, cache_NW).to(wide)  # a row gather: ten times indexing's speed on a CPU
    # A weight of zero does not silence a NaN: what lies beyond the length has to go before the products.
    keys_BKW = keys_BKW.masked_fill(beyond_BK[:, :, None], 0.0)
    q_BXW = torch.cat((q_latent_BQHC, q_rope_BQHR), dim=-1).to(wide).flatten(1, 2)  # X = Q * H
    scores_BXK = (q_BXW * scale) @ keys_BKW.transpose(1, 2)
    hidden_BXK = hidden_BQK.repeat_interleave(heads, dim=1)
    # A query that sees nothing (an empty sequence) would give 0/0: its weights become zero, and so its output.
    weights_BXK = scores_BXK.masked_fill(hidden_BXK, -torch.inf).softmax(-1).masked_fill(hidden_BXK, 0.0)
    out_BXC = weights_BXK @ keys_BKW[:, :, :latent]
    return out_BXC.to(q_latent_BQHC.dtype).view(batch, queries, heads, latent)
