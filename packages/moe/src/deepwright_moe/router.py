"""DeepSeek-V3's router: which experts a token goes to, and with what weight (V3 report, eq. 12-16).

The balancing bias takes part in the choice and never in the weight, and is a buffer: the optimizer does not see it,
the checkpoint does.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deepwright_core.model.correction import Correction
from deepwright_core.model.precision import WideBuffers
from deepwright_core.registry import ComponentConfig
from deepwright_kernels import route

from .few_tokens import ChooseBest, Chooser
from .routing import Routing, Rule, expert_logits


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


class BiasedTopKRouter(WideBuffers):
    """Group-limited top-k on biased scores ("noaux_tc" in published configs); a cast leaves the bias in float32."""

    own_products: ClassVar = ("weight",)
    bias_E: Tensor

    def __init__(self, config: RouterConfig, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.corrections: dict[str, Correction] = {}
        self.config, self.experts, self.top_k = config, experts, top_k
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self._rule: Rule = {
            "scoring": config.scoring,
            "groups": config.groups,
            "top_groups": config.top_groups,
            "group_best": 2,
            "normalise": config.normalise,
            "scaling": config.scaling,
        }
        self.register_buffer("bias_E", torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = expert_logits(x_TD, self.weight, self.corrections.get("weight"))
        choice = route(logits_TE, self.bias_E, self.top_k, **self._rule)
        return Routing(choice.experts_TK, choice.weights_TK, choice.scores_TE)

    def few_rows_chooser(self) -> Chooser:
        """What `few_tokens` makes of the logits."""
        return ChooseBest(self.bias_E, self.top_k, self._rule)

    @torch.no_grad()
    def balance(self, load_E: Tensor) -> None:
        """b += γ · sign(mean load − load), from the tokens each expert got in the whole global batch."""
        load_E = load_E.float()
        self.bias_E += self.config.bias_update_speed * torch.sign(load_E.mean() - load_E)


def build_router(config: RouterConfig, hidden_size: int, experts: int, top_k: int) -> BiasedTopKRouter:
    """Sigmoid (or softmax) scores, group-limited top-k, balanced by a bias without auxiliary loss."""
    return BiasedTopKRouter(config, hidden_size, experts, top_k)
