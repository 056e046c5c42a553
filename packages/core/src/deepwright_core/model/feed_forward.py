"""The dense SwiGLU feed-forward (Shazeer 2020), and what every feed-forward variant offers the model.

Shapes: B sequences, S tokens, D hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..registry import ComponentConfig, Registry
from .config import ModelConfig
from .few_rows import MOST_VALUES, FeedForwardForm, is_plain, transposed
from .record import ForwardRecord


@dataclass(frozen=True)
class Mixture:
    """What a mixture of experts says of itself: each token goes to `top_k` of `experts`, and to the `shared` ones."""

    experts: int
    top_k: int
    shared: int


class FeedForward(Protocol):
    """What the model asks of a feed-forward variant. `record` collects losses and loads while training.

    One that is a mixture of experts has an attribute `mixture: Mixture`; one with a form for decode steps on a CPU, a
    method `few_rows_form` (`few_rows`).
    """

    def forward(self, x_BSD: Tensor, record: ForwardRecord | None) -> Tensor: ...


class DenseConfig(ComponentConfig):
    """Dense SwiGLU; `intermediate_size: 0` takes the model's."""

    name: str = "dense"
    intermediate_size: int = Field(0, ge=0)


class SwiGLU(nn.Module):
    """down(silu(gate x) · (up x)), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, record: ForwardRecord | None = None) -> Tensor:
        return self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))

    def few_rows_form(self) -> FeedForwardForm | None:
        """For a decode step of few rows on a CPU (`few_rows`): gate and up in one product."""
        layers = self.gate, self.up, self.down
        if not all(map(is_plain, layers)) or sum(layer.weight.numel() for layer in layers) > MOST_VALUES:
            return None
        gate_up_DI, down_ID = transposed(self.gate.weight, self.up.weight), transposed(self.down.weight)

        def form(x_TD: Tensor) -> Tensor:
            gate_TI, up_TI = torch.mm(x_TD, gate_up_DI).chunk(2, 1)
            return torch.mm(F.silu(gate_TI).mul_(up_TI), down_ID)

        return form


def build_dense(config: DenseConfig, model: ModelConfig, layer: int) -> SwiGLU:
    """Dense SwiGLU feed-forward."""
    return SwiGLU(model.hidden_size, config.intermediate_size or model.intermediate_size)


def register(registry: Registry) -> None:
    registry.add("ffn", "dense", config=DenseConfig)(build_dense)
