"""Sliding-window attention (Beltagy et al. 2020) as a plugin: each token sees the `window` tokens up to itself.

It is grouped-query attention with a narrower mask, in training and in decoding. The cache still holds the whole
sequence: freeing the blocks that no window reaches any more would need the engine's help, and is left out.

Shapes: B sequences, S tokens, Q new tokens, D hidden, L longest context, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from deepwright_core.hookspecs import hookimpl
from deepwright_core.model.attention import (
    GQAConfig,
    GroupedQueryAttention,
    Rope,
    attend,
    gather_context,
    write_cache,
)
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

    def forward(self, x_BSD: Tensor, rope: Rope, mask_BSS: Tensor | None) -> Tensor:
        size = x_BSD.shape[1]
        near_SS = torch.ones(size, size, dtype=torch.bool, device=x_BSD.device).tril().triu(1 - self.window)
        return super().forward(x_BSD, rope, near_SS[None] if mask_BSS is None else mask_BSS & near_SS)

    def extend(self, x_BQD: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch) -> Tensor:
        q_BQHK, k_BQGK, v_BQGK = self._project(x_BQD, rope)
        write_cache(cache_NW, torch.cat([k_BQGK.flatten(2), v_BQGK.flatten(2)], -1), batch)
        context_BLW, mask_BQL = gather_context(cache_NW, batch)
        key_L = torch.arange(mask_BQL.shape[2], device=mask_BQL.device)
        near_BQL = key_L > batch.positions_BQ[..., None] - self.window
        k_BLGK, v_BLGK = context_BLW.to(q_BQHK.dtype).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)
        return self.o(attend(q_BQHK, k_BLGK, v_BLGK, mask_BQL & near_BQL, self.scale).flatten(2))


@hookimpl
def deepwright_register(registry: Registry) -> None:
    @registry.add("attention", "window", config=WindowConfig)
    def build(config: WindowConfig, model: ModelConfig, layer: int) -> GroupedQueryAttention:
        """Sliding-window grouped-query attention."""
        full = config.full_every and (layer + 1) % config.full_every == 0
        return GroupedQueryAttention(config, model) if full else WindowAttention(config, model)
