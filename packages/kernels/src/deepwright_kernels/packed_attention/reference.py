"""Causal attention over packed rows in plain torch: softmax(scale · q kᵀ) v where a query may see a key (Vaswani et al.
2017, eq. 1), with the softmax in float32.

Shapes: B rows, S positions, H query heads, G key/value heads (each serves H / G query heads), K key width, V value
width. In the products, N is a key's position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seen(starts_BS: Tensor | None, size: int, device: torch.device) -> Tensor:
    """True where the query at a position (row) may see the key at another: starts <= key <= query. [B or 1, S, S]."""
    index_S = torch.arange(size, device=device)
    causal_SN = index_S <= index_S[:, None]
    return causal_SN[None] if starts_BS is None else causal_SN & (index_S >= starts_BS[:, :, None])


def packed_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> Tensor:
    """out_BSHV in q's dtype."""
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    group = q_BSHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHV = (t.to(wide).repeat_interleave(group, dim=2) for t in (k_BSGK, v_BSGV))
    scores_BHSN = torch.einsum("bshk,bnhk->bhsn", q_BSHK.to(wide) * scale, k_BSHK)
    hidden_BSN = ~seen(starts_BS, q_BSHK.shape[1], q_BSHK.device)
    weights_BHSN = scores_BHSN.masked_fill(hidden_BSN[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhsn,bnhv->bshv", weights_BHSN, v_BSHV).to(q_BSHK.dtype)
