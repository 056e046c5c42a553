"""The router: which experts a token goes to, and with what weight (DeepSeek-V3 report, eq. 12-16).

Scores and the choice are float32, whatever the model's precision. The balancing bias takes part in the choice and
never in the weight, and is a buffer: the optimizer does not see it, the checkpoint does.

Shapes: T tokens, D hidden, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from deepwright_core.registry import ComponentConfig


class RouterConfig(ComponentConfig):
    """Expert choice. `groups` > 1 first keeps the `top_groups` groups whose two best experts score highest.

    bias_update_speed: γ of the auxiliary-loss-free balance (0 turns it off).
    """

    name: str = "noaux_tc"
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    groups: int = Field(1, ge=1)
    top_groups: int = Field(1, ge=1)
    normalise: bool = True
    scaling: float = Field(1.0, gt=0)
    bias_update_speed: float = Field(0.001, ge=0)


class Routing(NamedTuple):
    """experts_TK: int64 ids. weights_TK: float32. scores_TE: float32 scores of every expert, without the bias."""

    experts_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor


class BiasedTopKRouter(nn.Module):
    """Group-limited top-k on biased scores ("noaux_tc" in published configs)."""

    bias_E: Tensor

    def __init__(self, config: RouterConfig, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.config, self.experts, self.top_k = config, experts, top_k
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.register_buffer("bias_E", torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = x_TD.float() @ self.weight.float().T
        scores_TE = logits_TE.sigmoid() if self.config.scoring == "sigmoid" else logits_TE.softmax(-1)
        experts_TK = self._choose(scores_TE.detach() + self.bias_E)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.config.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts_TK, weights_TK * self.config.scaling, scores_TE)

    def _choose(self, biased_TE: Tensor) -> Tensor:
        groups = self.config.groups
        if groups > 1:
            grouped_TGX = biased_TE.unflatten(1, (groups, -1))
            group_scores_TG = grouped_TGX.topk(2, dim=-1).values.sum(-1)
            kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
            kept_TG.scatter_(1, group_scores_TG.topk(self.config.top_groups, dim=-1, sorted=False).indices, True)
            # -inf, not 0: with a negative bias an expert of a dropped group could beat a kept one at 0.
            biased_TE = grouped_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
        return biased_TE.topk(self.top_k, dim=-1, sorted=False).indices

    @torch.no_grad()
    def balance(self, load_E: Tensor) -> None:
        """b += γ · sign(mean load − load), from the tokens each expert got in the whole global batch."""
        load_E = load_E.float()
        self.bias_E += self.config.bias_update_speed * torch.sign(load_E.mean() - load_E)


def build_router(config: RouterConfig, hidden_size: int, experts: int, top_k: int) -> BiasedTopKRouter:
    """Sigmoid (or softmax) scores, group-limited top-k, balanced by a bias without auxiliary loss."""
    return BiasedTopKRouter(config, hidden_size, experts, top_k)
