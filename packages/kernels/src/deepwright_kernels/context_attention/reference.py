"""Attention of new tokens over a cached context in plain torch, with the softmax in float32.

Shapes: B sequences, Q new tokens of each, H query heads, G key/value heads, K key width, V value width, N positions of
the context.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def seen(positions_BQ: Tensor, lengths_B: Tensor, starts_BQ: Tensor | None, context: int) -> Tensor:
    """True where a query (row) may see a position of the context. [B, Q, N]."""
    index_N = torch.arange(context, device=positions_BQ.device)
    last_BQ = torch.minimum(positions_BQ, lengths_B[:, None] - 1)
    seen_BQN = index_N <= last_BQ[:, :, None]
    return seen_BQN if starts_BQ is None else seen_BQN & (index_N >= starts_BQ[:, :, None])


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
    wide = torch.promote_types(q_BQHK.dtype, torch.float32)
    k_BNGK, v_BNGV = expand(0, context)
    group = q_BQHK.shape[2] // k_BNGK.shape[2]
    # A weight of zero does not silence a NaN: what lies beyond the length has to go before the products.
    beyond_BN11 = (torch.arange(context, device=q_BQHK.device) >= lengths_B[:, None])[:, :, None, None]
    k_BNHK, v_BNHV = (
        t.to(wide).masked_fill(beyond_BN11, 0.0).repeat_interleave(group, dim=2) for t in (k_BNGK, v_BNGV)
    )
    scores_BHQN = torch.einsum("bqhk,bnhk->bhqn", q_BQHK.to(wide) * scale, k_BNHK)
    hidden_B1QN = ~seen(positions_BQ, lengths_B, starts_BQ, context)[:, None]
    weights_BHQN = scores_BHQN.masked_fill(hidden_B1QN, -torch.inf).softmax(-1).masked_fill(hidden_B1QN, 0.0)
    return torch.einsum("bhqn,bnhv->bqhv", weights_BHQN, v_BNHV).to(q_BQHK.dtype)
