"""How tokens come to their experts and back: to experts that are all here, or spread over ranks.

Over ranks every rank sees all tokens (attention is the same on each), computes what its own experts make of them, and
the ranks' results are added up. One collective a layer, of T · D values, and no rank waits for a size that another has
to tell: the form for decoding, where a rank's few rows cost less than an exchange of them would. Left out: all-to-all,
which moves fewer values when tokens are many and lie on different ranks; gradients over ranks.

Shapes: T tokens, D hidden, E experts, K experts per token, R rows in expert order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deepwright_core.parallel.ranks import Ranks
from deepwright_kernels import expert_order, unpermute

from .routing import Routing

if TYPE_CHECKING:
    from .mixture import Experts


class Dispatch(Protocol):
    """What the mixture asks."""

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The weighted sum of what each token's experts make of it [T, D], and each expert's tokens [E]."""


class AllHere:
    """Every expert is in `experts`."""

    def __init__(self, experts: int) -> None:
        self._experts = experts

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        order = expert_order(routing.experts_TK, self._experts, experts.alignment)
        return unpermute(experts(x_TD, order), order, routing.weights_TK), order.counts_E


class OverRanks:
    """Those of `share` are in `experts`; the others are with the other ranks."""

    def __init__(self, experts: int, share: slice, ranks: Ranks) -> None:
        self._experts, self._ranks = experts, ranks
        self._first, self._own = share.start, share.stop - share.start

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        own_TK = routing.experts_TK - self._first
        elsewhere_TK = (own_TK < 0) | (own_TK >= self._own)
        # Copies for elsewhere are a last group, behind the rows that are computed.
        order = expert_order(own_TK.masked_fill(elsewhere_TK, self._own), self._own + 1)
        here = order._replace(counts_E=order.counts_E[:-1], ends_E=order.ends_E[:-1].contiguous())
        y_RD = experts(x_TD, here)
        row_R = torch.arange(len(y_RD), device=y_RD.device)
        y_RD = y_RD.masked_fill((row_R >= here.ends_E[-1])[:, None], 0.0)  # where anything may stand
        out_TD = self._ranks.add_up(unpermute(y_RD, order, routing.weights_TK))
        load_E = torch.zeros(self._experts, dtype=torch.int64, device=x_TD.device)
        flat_X = routing.experts_TK.flatten().long()
        return out_TD, load_E.scatter_add_(0, flat_X, torch.ones_like(flat_X))
