"""Optimizers: AdamW for everything, or Muon for hidden matrices with AdamW for the rest.

Every parameter group carries `peak_lr`; the trainer sets `lr` from it and the schedule before each step. Parameters
that do not want a gradient (a fine-tuning may freeze most of them) are in no group.

Shapes of Muon: E matrices of equal shape [M, N] (experts are stacked, so a 3-D parameter is a batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from deepwright_kernels import newton_schulz

from ..model.precision import has_bf16
from ..registry import ComponentConfig, Registry

# Values that Muon orthogonalises in one call: enough to fill a GPU (22 experts of 2816 x 2048), and with the products
# about 1 GiB in bf16, however large the model is.
BATCH_VALUES = 2**27


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


class Matrices(NamedTuple):
    """Views of a parameter as a stack of matrices, of its gradient and of its momentum; all [E, M, N]."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor

    @property
    def kind(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        """What matrices must have in common to go through one call."""
        return self.weight.shape[1:], self.weight.dtype, self.weight.device


def batches(stacks: Iterable[Matrices], most_values: int) -> Iterator[list[Matrices]]:
    """All stacks, those of one shape together, in lists of at most `most_values` values (or of one larger matrix)."""
    alike: dict[Any, list[Matrices]] = {}
    for stack in stacks:
        alike.setdefault(stack.kind, []).append(stack)
    for stacks_of_a_kind in alike.values():
        most = max(1, most_values // max(1, stacks_of_a_kind[0].weight[0].numel()))
        batch: list[Matrices] = []
        count = 0
        for stack in stacks_of_a_kind:
            for piece in map(Matrices._make, zip(*(part.split(most) for part in stack), strict=True)):
                if batch and count + len(piece.weight) > most:
                    yield batch
                    batch, count = [], 0
                batch.append(piece)
                count += len(piece.weight)
        yield batch


class Muon(torch.optim.Optimizer):
    """Groups with `muon: True` take the orthogonalised update, the others AdamW's.

    Matrices of one shape (the same projection of all layers, all experts) are orthogonalised together.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: MuonConfig) -> None:
        self.config = config
        super().__init__(groups, {"muon": False, "weight_decay": config.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["muon"]:
                for batch in batches(map(self._with_momentum, parameters), BATCH_VALUES):
                    self._muon_update(batch, group["lr"])
            else:
                for parameter in parameters:
                    parameter.add_(self._adamw_update(parameter), alpha=-group["lr"])

    def _with_momentum(self, parameter: Tensor) -> Matrices:
        """The parameter's matrices, its gradient taken into the momentum."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - self.config.momentum)
        shape = (-1, *parameter.shape[-2:])
        return Matrices(parameter.view(shape), parameter.grad.reshape(shape), state["momentum"].view(shape))  # type: ignore[union-attr]

    def _muon_update(self, batch: list[Matrices], lr: float) -> None:
        first, sizes = batch[0].weight, [len(stack.weight) for stack in batch]
        nesterov_EMN = first.new_empty(sum(sizes), *first.shape[1:], dtype=self._iteration_dtype(first.device))
        for target, stack in zip(nesterov_EMN.split(sizes), batch, strict=True):
            target.copy_(stack.gradient.lerp(stack.momentum, self.config.momentum))
        update_EMN = newton_schulz(nesterov_EMN, self.config.newton_schulz_steps)
        scale = 0.2 * max(first.shape[1:]) ** 0.5
        for update, stack in zip(update_EMN.split(sizes), batch, strict=True):
            stack.weight.add_(update, alpha=-lr * scale)

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
