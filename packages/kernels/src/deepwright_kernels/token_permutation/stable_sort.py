"""The order of experts for a CPU: where rows have no gaps, a stable sort of the copies is the order itself.

Shapes: T tokens, K copies of each, E experts, R rows in expert order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def expert_order(experts_TK: Tensor, experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order_R, place_TK, counts_E, ends_E)."""
    if alignment > 1:
        return reference.expert_order(experts_TK, experts, alignment)
    flat_X = experts_TK.flatten().long()
    order_R = flat_X.argsort(stable=True)  # stable: copies of one expert keep the tokens' order
    place_X = torch.empty_like(flat_X, dtype=torch.int32)
    place_X[order_R] = torch.arange(len(flat_X), dtype=torch.int32, device=flat_X.device)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=flat_X.device)
    counts_E.scatter_add_(0, flat_X, torch.ones_like(flat_X))
    return order_R.int(), place_X.view(experts_TK.shape), counts_E, counts_E.cumsum(0).int()
