"""Group-limited choice (DeepSeek-V2 report, section 2.2.2): a token's experts come from a few groups only.

With a group on each machine, a token then travels to at most `top_groups` machines.

Shapes: T tokens, E experts, G groups, X experts of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_groups(scores_TE: Tensor, groups: int, top_groups: int, best: int) -> Tensor:
    """The scores with those of all but the `top_groups` highest groups at -inf.

    A group is worth the sum of its `best` highest scores: V2 takes its single best, V3 its two best.
    """
    if groups == 1:
        return scores_TE
    grouped_TGX = scores_TE.unflatten(1, (groups, -1))
    worth_TG = grouped_TGX.topk(best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    kept_TG.scatter_(1, worth_TG.topk(top_groups, dim=-1, sorted=False).indices, True)
    # -inf, not 0: with a negative bias an expert of a dropped group could beat a kept one at 0.
    return grouped_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
