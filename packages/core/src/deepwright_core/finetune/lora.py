"""LoRA (Hu et al. 2021): W + (alpha / rank) · B A trains in place of W, with B and A of a low rank.

A parametrization of the weight, not a module around the layer: so it works alike for a linear layer, for a stack of
experts ([E, out, in] has E pairs of factors), and for attention that multiplies a weight itself (absorbed decode).
B starts at zero, so the first step sees exactly the model that was given.

What is saved is memory for gradients and optimizer states, and almost all of a checkpoint. What is not: the sum is
formed before the product, so forward and backward cost what they cost without LoRA. Dropout is left out: it belongs on
the input of the factors, which a sum of weights does not see.

Shapes: ... stack of experts or nothing, R rank, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import adapter_files, targets
from .method import FineTuneConfig

OUTPUT = "adapter"


class LoraConfig(FineTuneConfig):
    """Low-rank adapters on matrices of the model; everything else stays as it is, the routers' bias included.

    rank: of each adapter. alpha: adapters count alpha / rank times.
    targets: parts of the paths of the matrices to adapt, such as attention, ffn.experts, ffn.shared, ffn.gate.
    """

    name: str = "lora"
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: list[str] = Field(["attention", "ffn.experts"], min_length=1)

    @field_validator("targets")
    @classmethod
    def _check(cls, value: list[str]) -> list[str]:
        wrong = [target for target in value if not all(target.split("."))]
        if wrong:
            raise ValueError(f"targets holds {wrong[0]!r}; expected names with dots between them, such as ffn.experts")
        return value

    def problems(self, model: Callable[[], nn.Module], where: str) -> list[str]:
        return targets.problems(model(), self.targets, f"{where}.targets")


class LowRank(nn.Module):
    """W -> W + scale · B A, in the weight's own precision whatever autocast says: a correction of a thousandth would
    not survive bf16. While `merged` is set, it is the sum."""

    merged: Tensor | None

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, outputs, inputs = weight.shape
        bound = inputs**-0.5
        factor_RK = torch.empty(*stack, rank, inputs).uniform_(-bound, bound, generator=generator)
        self.a_RK = nn.Parameter(factor_RK.to(weight))
        self.b_NR = nn.Parameter(torch.zeros(*stack, outputs, rank).to(weight))
        self.scale = scale
        self.merged = None

    def forward(self, weight_NK: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged
        with torch.autocast(weight_NK.device.type, enabled=False):
            return weight_NK + self.scale * (self.b_NR @ self.a_RK)


@dataclass(frozen=True)
class Adapted:
    """A weight with its adapter: the module that owns it, and its name there."""

    owner: nn.Module
    name: str
    low_rank: LowRank

    @property
    def original(self) -> nn.Parameter:
        """The weight as it was given."""
        value: nn.Parameter = self.owner.parametrizations[self.name].original  # type: ignore[index, union-attr]
        return value


class Lora:
    """A model with adapters on it, which alone train."""

    balances = False

    def __init__(self, config: LoraConfig, model: nn.Module, seed: int) -> None:
        self.config, self.model = config, model
        self.adapted: dict[str, Adapted] = {}
        total = sum(parameter.numel() for parameter in model.parameters())
        chosen = targets.chosen(model, config.targets)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for path, weight in chosen.items():
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            low_rank = LowRank(weight, config.rank, config.alpha / config.rank, generator)
            parametrize.register_parametrization(owner, name, low_rank)
            self.adapted[path] = Adapted(owner, name, low_rank)
        trained = sum(parameter.numel() for each in self.adapted.values() for parameter in each.low_rank.parameters())
        self.metrics: Mapping[str, float] = {
            "parameters_trained": float(trained),
            "parameters_trained_share": trained / total,
        }
        self.notes = (
            f"LoRA of rank {config.rank} on {', '.join(config.targets)}: {trained:,} parameters trained, "
            f"{trained / total:.1%} of the model's {total:,}. {OUTPUT}/ holds them alone.",
        )

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The sums, formed once."""
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        try:
            for each in self.adapted.values():
                with torch.no_grad():
                    merged = each.low_rank(each.original)
                each.low_rank.merged = merged.requires_grad_()
            # Nothing here is differentiated; but autocast keeps its narrow copy only of a leaf that wants a gradient,
            # and would make those of all other weights anew for each token.
            for parameter in frozen:
                parameter.requires_grad_()
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for each in self.adapted.values():
                each.low_rank.merged = None

    def originals(self) -> dict[str, Tensor]:
        """The adapted weights as they were given, by path."""
        return {path: each.original for path, each in self.adapted.items()}

    def factors(self) -> dict[str, Tensor]:
        """The adapters' own tensors: the path of the weight, then a_RK or b_NR."""
        return {
            f"{path}.{name}": tensor
            for path, each in self.adapted.items()
            for name, tensor in each.low_rank.named_parameters()
        }

    @torch.no_grad()
    def load_factors(self, stored: Mapping[str, Tensor]) -> None:
        """Take over the values of factors of the same names and shapes."""
        for name, tensor in self.factors().items():
            tensor.copy_(stored[name])

    def finish(self, directory: Path) -> dict[str, str]:
        """Write the adapters, then put them into the weights."""
        adapter_files.write(directory / OUTPUT, self.config, self.originals(), self.factors())
        self.merge()
        return {OUTPUT: OUTPUT}

    @torch.no_grad()
    def merge(self) -> None:
        """Weights take the place of weights with adapters. Summed on the CPU, wherever the model is, so that the same
        adapters on the same base give the same bits to whoever does it again."""
        for each in self.adapted.values():
            home = each.original.device
            merged = each.low_rank.cpu()(each.original.cpu())
            each.original.copy_(merged.to(home))
            parametrize.remove_parametrizations(each.owner, each.name, leave_parametrized=False)
        self.adapted = {}
        self.model.requires_grad_()


def build(config: LoraConfig, model: nn.Module, seed: int) -> Lora:
    """Low-rank adapters train, on matrices chosen by their path; the weights stay as they are."""
    return Lora(config, model, seed)
