"""Cross-entropy of a linear head, in plain torch: all logits at once. The specification.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss_T, entropy_T) of softmax(hidden · weightᵀ / temperature); `chunk` changes nothing here."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = (hidden_TD @ weight_VD.to(hidden_TD.dtype).T).to(wide) / temperature
    logp_TV = logits_TV.log_softmax(-1)
    ignored_T = targets_T == ignore_index
    loss_T = -logp_TV.gather(-1, targets_T.masked_fill(ignored_T, 0)[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1).detach()
    return loss_T.masked_fill(ignored_T, 0.0), entropy_T.masked_fill(ignored_T, 0.0)


def weighted_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Σ_t token_weight_t · loss_t."""
    loss_T, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T, ignore_index, None, temperature)
    return (loss_T * token_weights_T.detach()).sum()
