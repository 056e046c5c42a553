"""DeepSeek-V2's router (V2 report, section 2.2): softmax scores, no bias, groups ranked by their single best expert.

Only auxiliary losses keep its experts' load even: there is nothing here to correct after a step. With one group this
is the plain greedy choice of DeepSeekMoE and V2-Lite.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from deepwright_core.model.correction import Correction
from deepwright_core.registry import ComponentConfig
from deepwright_kernels import route

from .few_tokens import ChooseBest, Chooser
from .routing import Routing, Rule, expert_logits


class SoftmaxRouterConfig(ComponentConfig):
    """Expert choice. `groups` > 1 first keeps the `top_groups` groups whose best expert scores highest.

    normalise: weights are divided by their sum before `scaling`. Published V2 models do not.
    """

    name: str = "group_limited_greedy"
    groups: int = Field(1, ge=1)
    top_groups: int = Field(1, ge=1)
    normalise: bool = False
    scaling: float = Field(1.0, gt=0)


class SoftmaxTopKRouter(nn.Module):
    """Group-limited top-k on softmax scores ("greedy" and "group_limited_greedy" in published configs)."""

    own_products: ClassVar = ("weight",)

    def __init__(self, config: SoftmaxRouterConfig, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.corrections: dict[str, Correction] = {}
        self.config, self.top_k = config, top_k
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self._rule: Rule = {
            "scoring": "softmax",
            "groups": config.groups,
            "top_groups": config.top_groups,
            "group_best": 1,
            "normalise": config.normalise,
            "scaling": config.scaling,
        }

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = expert_logits(x_TD, self.weight, self.corrections.get("weight"))
        choice = route(logits_TE, None, self.top_k, **self._rule)
        return Routing(choice.experts_TK, choice.weights_TK, choice.scores_TE)

    def few_rows_chooser(self) -> Chooser:
        """What `few_tokens` makes of the logits."""
        return ChooseBest(None, self.top_k, self._rule)

    def balance(self, load_E: Tensor) -> None:
        """Nothing: without a bias, the loss alone evens the load."""


def build_softmax_router(config: SoftmaxRouterConfig, hidden_size: int, experts: int, top_k: int) -> SoftmaxTopKRouter:
    """Softmax scores, group-limited top-k, balanced by auxiliary loss alone (DeepSeek-V2)."""
    return SoftmaxTopKRouter(config, hidden_size, experts, top_k)
