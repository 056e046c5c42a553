"""DeepSeek's routers (V3 report, eq. 12-16; V2 report, section 2.2), in plain torch. The specification.

Ties go to the lowest index, because sorting is stable: `topk` would promise nothing.

Shapes: T tokens, E experts, K chosen experts, G groups, X experts of a group, N values of which the best are taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

First = Callable[[Tensor, int], Tensor]


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
    first: First | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(experts_TK, weights_TK, scores_TE, counts_E). `first`: another way to find the best, `first_by_sorting`'s."""
    first = first or first_by_sorting
    scores_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(-1)
    # The bias takes part in the choice and never in the weight.
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    experts_TK = first(keep_top_groups(choice_TE, groups, top_groups, group_best, first), top_k)
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    flat_X = experts_TK.flatten()
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
    counts_E = counts_E.scatter_add(0, flat_X, torch.ones_like(flat_X))
    return experts_TK, weights_TK * scaling, scores_TE, counts_E


def keep_top_groups(scores_TE: Tensor, groups: int, top_groups: int, best: int, first: First) -> Tensor:
    """The scores with those of all but the `top_groups` highest groups at -inf (V2 report, section 2.2.2).

    With a group on each machine, a token then travels to at most `top_groups` machines. A group is worth the sum of
    its `best` highest scores: V2 takes its single best, V3 its two best.
    """
    if top_groups == groups:
        return scores_TE
    grouped_TGX = scores_TE.unflatten(1, (groups, -1))
    worth_TG = grouped_TGX.topk(best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    kept_TG.scatter_(1, first(worth_TG, top_groups), True)
    # -inf, not 0: with a negative bias an expert of a dropped group could beat a kept one at 0.
    return grouped_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)


def first_by_sorting(values_TN: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row are, the largest first and of equals the lowest index first. [T, count]."""
    return values_TN.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()
