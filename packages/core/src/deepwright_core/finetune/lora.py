"""LoRA (Hu et al. 2021): W + (alpha / rank) · B A trains in place of W, with B and A of a low rank.

A parametrization of the weight, not a module around the layer: so it works alike for a linear layer, for a stack of
experts ([E, out, in] has E pairs of factors), and for attention that multiplies a weight itself (absorbed decode).
B starts at zero, so the first step sees exactly the model that was given.

What is saved is memory for gradients and optimizer states, and almost all of a checkpoint. What is not: the sum is
formed before the product, so forward and backward cost what they cost without LoRA. Dropout is left out: it belongs on
the input of the factors, which a sum of weights does not see.

Shapes: ... stack of experts or nothing, R rank, N outputs, K inputs, X new rows.
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
VOCABULARY = ("embedding.weight", "head.weight")  # where new tokens have rows; a tied head's are the embedding's


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


class Adapter(nn.Module):
    """W -> W + scale · B A, in the weight's own precision whatever autocast says: a correction of a thousandth would
    not survive bf16. `new_rows`: so many of the last rows train in place of what W holds there; rank 0: nothing else
    does. While `merged` is set, it is the result."""

    a_RK: nn.Parameter | None
    b_NR: nn.Parameter | None
    rows_XK: nn.Parameter | None
    merged: Tensor | None

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator, new_rows: int = 0) -> None:
        super().__init__()
        *stack, outputs, inputs = weight.shape
        self.a_RK = self.b_NR = self.rows_XK = self.merged = None
        if rank:
            bound = inputs**-0.5
            factor_RK = torch.empty(*stack, rank, inputs).uniform_(-bound, bound, generator=generator)
            self.a_RK = nn.Parameter(factor_RK.to(weight))
            self.b_NR = nn.Parameter(torch.zeros(*stack, outputs, rank).to(weight))
        if new_rows:
            self.rows_XK = nn.Parameter(weight.detach()[-new_rows:].clone())
        self.scale = scale

    def forward(self, weight_NK: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged
        with torch.autocast(weight_NK.device.type, enabled=False):
            if self.rows_XK is not None:
                weight_NK = torch.cat([weight_NK[: -len(self.rows_XK)], self.rows_XK])
            if self.a_RK is not None and self.b_NR is not None:
                weight_NK = weight_NK + self.scale * (self.b_NR @ self.a_RK)
            return weight_NK


@dataclass(frozen=True)
class Adapted:
    """A weight as it was given, its adapter, and its places (module, name there): a tied head's weight has two."""

    original: nn.Parameter
    adapter: Adapter
    places: tuple[tuple[nn.Module, str], ...]


class Lora:
    """A model with adapters on it, which alone train.

    new_rows: how many of the last rows of the vocabulary are new. They are all the same mean yet, and could never be
    told apart if they were frozen: so they train as they are, in embedding and head.
    """

    balances = False

    def __init__(self, config: LoraConfig, model: nn.Module, seed: int, new_rows: int = 0) -> None:
        self.config, self.model = config, model
        self.adapted: dict[str, Adapted] = {}
        total = sum(parameter.numel() for parameter in model.parameters())
        chosen = targets.chosen(model, config.targets)
        grown = {path: weight for path, weight in targets.matrices(model).items() if new_rows and path in VOCABULARY}
        model.requires_grad_(False)
        paths = targets.places(model)
        generator = torch.Generator().manual_seed(seed)
        for path, weight in {**grown, **chosen}.items():
            rank = config.rank if path in chosen else 0
            rows = new_rows if path in grown else 0
            each = Adapter(weight, rank, config.alpha / config.rank, generator, rows)
            places = []
            for place in paths[id(weight)]:
                owner, _, name = place.rpartition(".")
                places.append((model.get_submodule(owner), name))
                parametrize.register_parametrization(*places[-1], each)
            self.adapted[path] = Adapted(weight, each, tuple(places))
        trained = sum(tensor.numel() for tensor in self.factors().values())
        self.metrics: Mapping[str, float] = {
            "parameters_trained": float(trained),
            "parameters_trained_share": trained / total,
        }
        also = f" and {new_rows} new rows of the vocabulary" if new_rows else ""
        self.notes = (
            f"LoRA of rank {config.rank} on {', '.join(config.targets)}{also}: {trained:,} parameters trained, "
            f"{trained / total:.1%} of the model's {total:,}. {OUTPUT}/ holds them alone.",
        )

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The sums, formed once."""
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        try:
            for each in self.adapted.values():
                with torch.no_grad():
                    merged = each.adapter(each.original)
                each.adapter.merged = merged.requires_grad_()
            # Nothing here is differentiated; but autocast keeps its narrow copy only of a leaf that wants a gradient,
            # and would make those of all other weights anew for each token.
            for parameter in frozen:
                parameter.requires_grad_()
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for each in self.adapted.values():
                each.adapter.merged = None

    def originals(self) -> dict[str, Tensor]:
        """The adapted weights as they were given, by path."""
        return {path: each.original for path, each in self.adapted.items()}

    def factors(self) -> dict[str, Tensor]:
        """The adapters' own tensors: the path of the weight, then a_RK and b_NR, or rows_XK."""
        return {
            f"{path}.{name}": tensor
            for path, each in self.adapted.items()
            for name, tensor in each.adapter.named_parameters()
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
            each.original.copy_(each.adapter.cpu()(each.original.cpu()).to(home))
            for owner, name in each.places:
                parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        self.adapted = {}
        self.model.requires_grad_()


def build(config: LoraConfig, model: nn.Module, seed: int, new_rows: int) -> Lora:
    """Low-rank adapters train, on matrices chosen by their path; the weights stay as they are."""
    return Lora(config, model, seed, new_rows)
