"""Optimizers: AdamW for everything, or Muon for hidden matrices with AdamW for the rest.

Every parameter group carries `peak_lr`; the trainer sets `lr` from it and the schedule before each step. Parameters
that do not want a gradient (a fine-tuning may freeze most of them) are in no group.

Shapes of Muon: E matrices of equal shape [M, N] (experts are stacked, so a 3-D parameter is a batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..model.precision import has_bf16
from ..registry import ComponentConfig, Registry

# Quintic of Newton-Schulz as published with Muon (Jordan et al. 2024): fast near zero slope, not exactly convergent.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class AdamWConfig(ComponentConfig):
    """AdamW with DeepSeek-V3's values. Norms and other vectors are not decayed."""

    name: str = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)


class MuonConfig(AdamWConfig):
    """Muon (momentum, then orthogonalisation) for hidden matrices; AdamW's values hold for the rest.

    Updates are scaled to AdamW's root mean square (Moonlight: 0.2·√max(M, N)), so one learning rate serves both.
    The iteration runs in bf16 where the machine has it (auto), which it was made for: it only has to come near.
    """

    name: str = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    newton_schulz_steps: int = Field(5, ge=1)
    newton_schulz_precision: Literal["auto", "fp32", "bf16"] = "auto"


def orthogonalise(matrices_EMN: Tensor, steps: int) -> Tensor:
    """Nearest (semi-)orthogonal matrices, approximately: Newton-Schulz on each, in the input's dtype."""
    a, b, c = NEWTON_SCHULZ
    x = matrices_EMN / (matrices_EMN.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Groups with `muon: True` take the orthogonalised update, the others AdamW's."""

    def __init__(self, groups: Iterable[dict[str, Any]], config: MuonConfig) -> None:
        self.config = config
        super().__init__(groups, {"muon": False, "weight_decay": config.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            update = self._muon_update if group["muon"] else self._adamw_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter), alpha=-group["lr"])

    def _muon_update(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 1 - self.config.momentum)
        nesterov = parameter.grad.lerp(momentum, self.config.momentum)  # type: ignore[union-attr]
        scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
        update = orthogonalise(nesterov.to(self._iteration_dtype(parameter.device)), self.config.newton_schulz_steps)
        return update.to(parameter.dtype) * scale

    def _iteration_dtype(self, device: torch.device) -> torch.dtype:
        asked = self.config.newton_schulz_precision
        return torch.bfloat16 if asked == "bf16" or (asked == "auto" and has_bf16(device)) else torch.float32

    def _adamw_update(self, parameter: Tensor) -> Tensor:
        state, config = self.state[parameter], self.config
        step = state.setdefault("step", torch.zeros(()))
        first = state.setdefault("exp_avg", torch.zeros_like(parameter))
        second = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        step += 1
        first.lerp_(parameter.grad, 1 - config.beta1)
        second.lerp_(parameter.grad.square(), 1 - config.beta2)  # type: ignore[union-attr]
        count = step.item()
        denominator = (second / (1 - config.beta2**count)).sqrt() + config.eps
        return first / (1 - config.beta1**count) / denominator


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1


def _filled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def build_adamw(config: AdamWConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if _is_matrix(p)], "weight_decay": config.weight_decay, "peak_lr": lr},
        {"params": [p for p in parameters if not _is_matrix(p)], "weight_decay": 0.0, "peak_lr": lr},
    ]
    return torch.optim.AdamW(_filled(groups), lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def build_muon(config: MuonConfig, model: nn.Module, lr: float) -> Muon:
    """Muon for hidden matrices; AdamW for embedding, head, routers and norms."""
    hidden, other, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not _is_matrix(parameter):
            vectors.append(parameter)
        elif name.startswith(("embedding.", "head.")) or ".router." in name:
            other.append(parameter)
        else:
            hidden.append(parameter)
    groups = [
        {"params": hidden, "muon": True, "peak_lr": lr, "lr": lr},
        {"params": other, "peak_lr": lr, "lr": lr},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": lr, "lr": lr},
    ]
    return Muon(_filled(groups), config)


def register(registry: Registry) -> None:
    registry.add("optimizer", "adamw", config=AdamWConfig)(build_adamw)
    registry.add("optimizer", "muon", config=MuonConfig)(build_muon)
