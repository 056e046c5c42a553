"""How even the experts' load is: the sequence-wise auxiliary loss, and the figure people watch.

Shapes: B sequences, S tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_balance_loss(scores_BSE: Tensor, top_k: int, real_BS: Tensor | None) -> Tensor:
    """Complementary sequence-wise balance loss without its weight α (DeepSeek-V3 report, eq. 17-20), mean over B.

    f_i = E/(K·T) · #(tokens whose K best *unbiased* scores hold i),  P_i = mean over tokens of s_i / Σ s.
    Padding (real_BS False) counts neither as token nor as choice.
    """
    experts = scores_BSE.shape[-1]
    real_BS1 = torch.ones_like(scores_BSE[..., :1]) if real_BS is None else real_BS[..., None].to(scores_BSE.dtype)
    tokens_B1 = real_BS1.sum(1).clamp(min=1)
    best_BSK = scores_BSE.detach().topk(top_k, dim=-1, sorted=False).indices
    chosen_BSE = torch.zeros_like(scores_BSE).scatter_(-1, best_BSK, 1.0)
    frequency_BE = (chosen_BSE * real_BS1).sum(1) * experts / (top_k * tokens_B1)
    share_BSE = scores_BSE / (scores_BSE.sum(-1, keepdim=True) + 1e-20)
    mean_share_BE = (share_BSE * real_BS1).sum(1) / tokens_B1
    return (frequency_BE * mean_share_BE).sum(-1).mean()
