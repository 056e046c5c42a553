"""Sliding-window attention (Beltagy et al. 2020) as a plugin: each token sees the `window` tokens up to itself.

It is grouped-query attention whose queries begin later, in training and in decoding. The cache still holds the whole
sequence: freeing the blocks that no window reaches any more would need the engine's help, and is left out.

Shapes: B sequences, S tokens, Q new tokens, D hidden, N cache slots, W cache width.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from deepwright_core.hookspecs import hookimpl
from deepwright_core.model.attention import GQAConfig, GroupedQueryAttention, Rope
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig
from deepwright_core.registry import Registry


class WindowConfig(GQAConfig):
    """Sliding-window attention: `window` tokens, and every `full_every`-th layer sees everything (0: none does)."""

    name: str = "window"
    window: int = Field(128, ge=1)
    full_every: int = Field(0, ge=0)


class WindowAttention(GroupedQueryAttention):
    """Grouped-query attention that looks back `window` tokens."""

    def __init__(self, config: WindowConfig, model: ModelConfig) -> None:
        super().__init__(config, model)
        self.window = config.window

    def forward(self, x_BSD: Tensor, rope: Rope, starts_BS: Tensor | None) -> Tensor:
        batch, size = x_BSD.shape[:2]
        near_BS = self._first_seen(torch.arange(size, device=x_BSD.device)).expand(batch, size)
        return super().forward(x_BSD, rope, near_BS if starts_BS is None else near_BS.maximum(starts_BS))

    def extend(
        self, x_BQD: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch, starts_BQ: Tensor | None = None
    ) -> Tensor:
        return super().extend(x_BQD, rope, cache_NW, batch, self._first_seen(batch.positions_BQ))

    def _first_seen(self, positions: Tensor) -> Tensor:
        return (positions - self.window + 1).clamp(min=0)


@hookimpl
def deepwright_register(registry: Registry) -> None:
    @registry.add("attention", "window", config=WindowConfig)
    def build(config: WindowConfig, model: ModelConfig, layer: int) -> GroupedQueryAttention:
        """Sliding-window grouped-query attention."""
        full = config.full_every and (layer + 1) % config.full_every == 0
        return GroupedQueryAttention(config, model) if full else WindowAttention(config, model)
