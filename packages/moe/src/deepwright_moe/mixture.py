"""DeepSeekMoE: shared experts for everyone, routed experts for the tokens that chose them (V3 report, eq. 12).

No token is dropped, there is no capacity. All experts run as two grouped matrix products over rows in expert order; the
host reads nothing on the way. Where the experts are is a matter of the dispatch, which expert parallelism replaces.
A decode step of a small mixture on a CPU goes through `few_tokens`.

Shapes: B sequences, S tokens, T = B·S, D hidden, E experts, K experts per token, I expert width, R rows in expert
order.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepwright_core.model.branches import side_by_side
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.correction import Correction
from deepwright_core.model.feed_forward import Mixture, SwiGLU
from deepwright_core.model.few_rows import MOST_VALUES, FeedForwardForm, is_plain
from deepwright_core.model.record import ForwardRecord
from deepwright_core.parallel.ranks import Ranks
from deepwright_core.registry import ComponentConfig, ComponentOf, Registry
from deepwright_kernels import (
    ExpertOrder,
    fp8_grouped_feed_forward,
    grouped_linear,
    grouped_swiglu,
    permute,
)

from .balance import sequence_balance_loss
from .dispatch import AllHere, Dispatch, OverRanks
from .few_tokens import FewTokens
from .routing import Routing

# Blocks of 128 tokens, along which FP8 gradients are quantised, must not reach from one expert into the next.
FP8_ALIGNMENT = 128


class MoEConfig(ComponentConfig):
    """Mixture of experts. `shared_experts` always run (their widths add up); `top_k` of `experts` are chosen.

    balance_loss: weight α of the sequence-wise balance loss (V3: 1e-4).
    """

    name: str = "moe"
    experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    shared_experts: int = Field(1, ge=0)
    intermediate_size: int = Field(64, ge=1)
    balance_loss: float = Field(1e-4, ge=0)
    router: Annotated[dict[str, Any], ComponentOf("router")] = {"name": "noaux_tc"}

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        problems = []
        if self.top_k > self.experts:
            problems.append(f"top_k is {self.top_k}; expected at most experts, which is {self.experts}")
        groups, top_groups = self.router.get("groups", 1), self.router.get("top_groups", 1)
        if isinstance(groups, int) and isinstance(top_groups, int) and groups >= 1:
            if self.experts % groups:
                problems.append(f"experts is {self.experts}; expected a multiple of router.groups, which is {groups}")
            elif groups > 1 and self.experts // groups < 2:
                problems.append(f"router.groups is {groups}; expected at least 2 of the {self.experts} experts in each")
            elif top_groups > groups:
                problems.append(f"router.top_groups is {top_groups}; expected at most router.groups, which is {groups}")
            elif self.top_k > self.experts // groups * top_groups:
                problems.append(
                    f"top_k is {self.top_k}; expected at most the {self.experts // groups * top_groups} experts "
                    f"that {top_groups} groups hold"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Experts(nn.Module):
    """E SwiGLU feed-forwards with their weights stacked: gate and up [E, 2·I, D], down [E, D, I]."""

    own_products: ClassVar = ("gate_up_EID", "down_EDI")

    def __init__(self, experts: int, top_k: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.corrections: dict[str, Correction] = {}
        self.active_share = top_k / experts
        self._trains_in_fp8 = False
        self.gate_up_EID = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_EDI = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def fp8_matrices(self) -> dict[str, Tensor]:
        """The stacks that are multiplied in FP8 (`deepwright_core.model.fp8`), the hidden width once for each half."""
        gate_EID, up_EID = self.gate_up_EID.chunk(2, 1)
        return {"experts' gate": gate_EID, "experts' up": up_EID, "experts' down": self.down_EDI}

    def train_in_fp8(self) -> None:
        """From now on multiply in block-scaled FP8 while training."""
        self._trains_in_fp8 = True

    @property
    def _in_fp8(self) -> bool:
        return self._trains_in_fp8 and self.training

    @property
    def alignment(self) -> int:
        """What the products ask every expert's rows to begin at a multiple of."""
        return FP8_ALIGNMENT if self._in_fp8 else 1

    def forward(self, x_TD: Tensor, order: ExpertOrder) -> Tensor:
        if self._in_fp8:
            x_RD = permute(x_TD.to(torch.bfloat16), order)
            return fp8_grouped_feed_forward(x_RD, self.gate_up_EID, self.down_EDI, order.ends_E)
        if self.corrections:
            return self._corrected(x_TD, order)
        h_RI = grouped_swiglu(x_TD, self.gate_up_EID, order)
        return grouped_linear(h_RI, self.down_EDI, order.ends_E)

    def _corrected(self, x_TD: Tensor, order: ExpertOrder) -> Tensor:
        """The same in steps, because adapters change what each product gives."""

        def product(name: str, x_RK: Tensor, weight_ENK: Tensor) -> Tensor:
            y_RN = grouped_linear(x_RK, weight_ENK, order.ends_E)
            correction = self.corrections.get(name)
            return y_RN if correction is None else correction.grouped(y_RN, x_RK, order)

        gate_RI, up_RI = product("gate_up_EID", permute(x_TD, order), self.gate_up_EID).chunk(2, -1)
        return product("down_EDI", F.silu(gate_RI) * up_RI, self.down_EDI)


class MixtureOfExperts(nn.Module):
    """routed(x) + shared(x). `layer` is the key under which load and loss are reported."""

    parts: ClassVar = {"router": "routers", "experts": "routed_experts", "shared": "shared_experts"}

    def __init__(self, config: MoEConfig, model: ModelConfig, layer: int, router: nn.Module) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.mixture = Mixture(config.experts, config.top_k, config.shared_experts)
        self.router = router
        self.experts = Experts(config.experts, config.top_k, model.hidden_size, config.intermediate_size)
        self.dispatch: Dispatch = AllHere(config.experts)
        self.shared = (
            SwiGLU(model.hidden_size, config.shared_experts * config.intermediate_size)
            if config.shared_experts
            else None
        )

    def forward(self, x_BSD: Tensor, record: ForwardRecord | None) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        if self.shared is None:
            out_TD, routing, load_E = self._routed(x_TD)
        else:
            shared = self.shared
            (out_TD, routing, load_E), shared_TD = side_by_side(
                lambda: self._routed(x_TD), lambda: shared(x_TD), x_TD.device
            )
            out_TD = out_TD + shared_TD
        if record is not None:
            self._report(record, routing.experts_TK, routing.scores_TE, load_E, x_BSD.shape[:2])
        return out_TD.view_as(x_BSD)

    def _routed(self, x_TD: Tensor) -> tuple[Tensor, Routing, Tensor]:
        """What the chosen experts make of each token, which those were, and how many tokens each got."""
        routing = self.router(x_TD)
        out_TD, load_E = self.dispatch(self.experts, x_TD, routing)
        return out_TD, routing, load_E

    def few_rows_form(self) -> FeedForwardForm | None:
        """For a decode step of few rows on a CPU (`deepwright_core.model.few_rows`), where the matrices are small."""
        chooser = getattr(self.router, "few_rows_chooser", None)
        corrected = self.experts.corrections or getattr(self.router, "corrections", None)
        if chooser is None or corrected or type(self.dispatch) is not AllHere:
            return None
        layers = [] if self.shared is None else [self.shared.gate, self.shared.up, self.shared.down]
        values = sum(weight.numel() for part in (self.experts, *layers) for weight in part.parameters())
        if values > MOST_VALUES or not all(map(is_plain, layers)):
            return None
        return FewTokens(self, cast(Tensor, self.router.weight), chooser())

    def spread(self, ranks: Ranks) -> list[str]:
        """Keep this rank's share of the experts (weights unset). Returns the names of the stacks that became shares."""
        config, whole = self.config, self.experts
        share = ranks.share(config.experts, f"ffn.experts of layer {self.layer}")
        hidden, width = whole.down_EDI.shape[1:]
        self.experts = Experts(len(range(config.experts)[share]), config.top_k, hidden, width)
        self.dispatch = OverRanks(config.experts, share, ranks)
        return [f"experts.{name}" for name, _ in self.experts.named_parameters()]

    def _report(
        self, record: ForwardRecord, experts_TK: Tensor, scores_TE: Tensor, load_E: Tensor, shape: torch.Size
    ) -> None:
        if record.real_BS is not None:
            real_TK = record.real_BS.flatten()[:, None].expand_as(experts_TK).to(load_E.dtype)
            load_E = torch.zeros_like(load_E).scatter_add_(0, experts_TK.flatten(), real_TK.flatten())
        record.loads[self.layer] = load_E
        if self.config.balance_loss:
            loss = sequence_balance_loss(scores_TE.unflatten(0, shape), self.config.top_k, record.real_BS)
            record.losses[self.layer] = self.config.balance_loss * loss

    def balance(self, load_E: Tensor) -> None:
        """Let the router correct its bias from the global batch's load."""
        self.router.balance(load_E)  # type: ignore[operator]


def build_moe_with(registry: Registry) -> Any:
    """The builder of `ffn: moe`, bound to the registry that knows the routers."""

    def build_moe(config: MoEConfig, model: ModelConfig, layer: int) -> MixtureOfExperts:
        """DeepSeekMoE: shared and routed experts."""
        router = registry.build("router", config.router, model.hidden_size, config.experts, config.top_k)
        return MixtureOfExperts(config, model, layer, router)

    return build_moe
