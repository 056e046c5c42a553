"""DeepSeek's routers (V3 report, eq. 12-16; V2 report, section 2.2), in plain torch. The specification.

Ties go to the lowest index, because sorting is stable: `topk` would promise nothing.

Shapes: T tokens, E experts, K chosen experts, G groups, X experts of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    scoring: str,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(experts_TK, weights_TK, scores_TE, counts_E)."""
    scores_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(-1)
    # The bias takes part in the choice and never in the weight.
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    choice_TE = keep_top_groups(choice_TE, groups, top_groups, group_best)
    experts_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    flat_X = experts_TK.flatten()
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
    counts_E = counts_E.scatter_add(0, flat_X, torch.ones_like(flat_X))
    return experts_TK, weights_TK * scaling, scores_TE, counts_E


def keep_top_groups(scores_TE: Tensor, groups: int, top_groups: int, best: int) -> Tensor:
    """The scores with those of all but the `top_groups` highest groups at -inf (V2 report, section 2.2.2).

    With a group on each machine, a token then travels to at most `top_groups` machines. A group is worth the sum of
    its `best` highest scores: V2 takes its single best, V3 its two best.
    """
    if groups == 1:
        return scores_TE
    grouped_TGX = scores_TE.unflatten(1, (groups, -1))
    worth_TG = grouped_TGX.topk(best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    kept_TG.scatter_(1, worth_TG.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups], True)
    # -inf, not 0: with a negative bias an expert of a dropped group could beat a kept one at 0.
    return grouped_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
