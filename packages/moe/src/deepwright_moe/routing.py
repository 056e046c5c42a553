"""What a router decides, and the part that all routers share: one logit for each expert.

Scores and the choice are float32, whatever the model's precision.

The choice itself is the operator `route` of deepwright_kernels.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from deepwright_core.model.correction import Correction


class Rule(TypedDict):
    """How experts are chosen from logits, in the words of the operator `route`."""

    scoring: str
    groups: int
    top_groups: int
    group_best: int
    normalise: bool
    scaling: float


class Routing(NamedTuple):
    """experts_TK: int64 ids. weights_TK: float32. scores_TE: float32 scores of every expert, without the bias."""

    experts_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor


def expert_logits(x_TD: Tensor, weight_ED: Tensor, correction: Correction | None = None) -> Tensor:
    """x Wᵀ in float32, also under autocast. [T, D] -> [T, E]. correction: of adapters, where some change the router."""
    if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        # Products of bfloat16 are exact in float32, in which the matrix units sum: no wider copies are needed.
        logits_TE = torch.mm(x_TD, weight_ED.T, out_dtype=torch.float32)
        return logits_TE if correction is None else correction.added(logits_TE, x_TD).float()
    with torch.autocast(x_TD.device.type, enabled=False):
        logits_TE = x_TD.float() @ weight_ED.float().T
        return logits_TE if correction is None else correction.added(logits_TE, x_TD).float()
