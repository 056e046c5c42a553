"""The order of experts, and the moves into it and out of it, in plain torch. The specification.

Shapes: T tokens, K copies of each, D width, E experts, R rows in expert order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_order(experts_TK: Tensor, experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order_R, place_TK, counts_E, ends_E)."""
    flat_X = experts_TK.flatten().long()
    rows = (len(flat_X) + experts * (alignment - 1)) // alignment * alignment
    counts_E = torch.zeros(experts, dtype=torch.int64, device=flat_X.device)
    counts_E = counts_E.scatter_add(0, flat_X, torch.ones_like(flat_X))
    aligned_E = (counts_E + alignment - 1) // alignment * alignment
    ends_E = aligned_E.cumsum(0)
    sorted_X = flat_X.argsort(stable=True)  # stable: copies of one expert keep the tokens' order
    rank_X = torch.arange(len(flat_X), device=flat_X.device) - (counts_E.cumsum(0) - counts_E)[flat_X[sorted_X]]
    row_X = (ends_E - aligned_E)[flat_X[sorted_X]] + rank_X
    order_R = flat_X.new_full((rows,), -1).scatter(0, row_X, sorted_X)
    place_X = torch.empty_like(flat_X).scatter(0, sorted_X, row_X)
    return order_R.int(), place_X.int().view_as(experts_TK), counts_E, ends_E.int()


def permute(x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's row at the places of its copies, zeros in the gaps."""
    tokens, copies = place_TK.shape
    token_R = torch.where(order_R < 0, tokens, order_R // max(1, copies))
    return torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])[token_R.long()]


def unpermute(y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ_k weights[t, k] · y[place[t, k]], in float32."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    y_TKD = y_RD[place_TK.long()].to(wide)
    return (y_TKD * weights_TK[..., None].to(wide)).sum(1).to(y_RD.dtype)
