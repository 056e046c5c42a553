"""Grouped-query attention (Ainslie et al. 2023), and what every attention variant offers the model.

Plain multi-head attention is the case `kv_heads = heads`. No dropout, no sliding window: those are plugins.

Shapes: B sequences, S tokens, Q new tokens, D hidden, H heads, G key/value heads, K head width, F = K / 2 rope pairs,
N cache slots, W = 2·G·K values cached per token, L longest context of the batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepwright_kernels import context_attention, packed_attention, rotary

from ..registry import ComponentConfig, Registry
from .cache import CacheBatch
from .config import ModelConfig
from .rope import softmax_scale

Rope = tuple[Tensor, Tensor]


class Attention(Protocol):
    """What the model asks of an attention variant.

    rope_dim: width of the rotated part of queries and keys.
    cache_width: values kept per token for decoding. mha_cache_width: what plain multi-head attention with the same
    heads would keep. fp8_cache_bytes: bytes per token of a cache in FP8, of one that can read and write such a cache.
    pair_flops: FLOPs for one pair of query and key (score and mix, all heads); an attention that
    decodes in another form says `pair_flops_decode` too. `heads`, where it has them: those of the queries.
    few_rows_form: optional, a method that gives a function for decode steps on a CPU (`few_rows`), or None.
    forward: training form. A query sees the keys from starts_BS (None: from 0) up to itself: those of its document.
    extend: writes the new tokens into the layer's cache and attends to everything cached so far.
    """

    rope_dim: int
    cache_width: int
    mha_cache_width: int
    pair_flops: int

    def forward(self, x_BSD: Tensor, rope: Rope, starts_BS: Tensor | None) -> Tensor: ...

    def extend(self, x_BQD: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch) -> Tensor: ...


class GQAConfig(ComponentConfig):
    """Grouped-query attention; `kv_heads` heads of keys and values serve `heads` query heads.

    qkv_bias: biases on queries, keys and values (Qwen2), none on the output.
    """

    name: str = "gqa"
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=2, multiple_of=2)
    qkv_bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> GQAConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}; expected a multiple of kv_heads, which is {self.kv_heads}")
        return self


def document_starts(segments_BS: Tensor) -> Tensor:
    """Where the document of each position begins in its row. [B, S] -> [B, S]; a document is a run of one number."""
    new_BS = segments_BS[:, 1:] != segments_BS[:, :-1]
    index_S = torch.arange(1, segments_BS.shape[1], device=segments_BS.device)
    return F.pad(index_S * new_BS, (1, 0)).cummax(1).values


def gather_context(cache_NW: Tensor, batch: CacheBatch, begin: int, end: int) -> Tensor:
    """What is cached of positions begin .. end - 1 of each sequence, [B, end - begin, W]; anything beyond a length."""
    position_L = torch.arange(begin, end, device=cache_NW.device)
    blocks_BL = batch.blocks_BP[:, position_L // batch.block_size]
    return F.embedding(blocks_BL * batch.block_size + position_L % batch.block_size, cache_NW)


def write_cache(cache_NW: Tensor, values_BQW: Tensor, batch: CacheBatch) -> None:
    """Store the new tokens' values in their slots."""
    cache_NW.index_copy_(0, batch.slots_BQ.flatten(), values_BQW.flatten(0, 1).to(cache_NW.dtype))


class GroupedQueryAttention(nn.Module):
    """GQA with interleaved RoPE on the whole head."""

    def __init__(self, config: GQAConfig, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.rope_dim = config.head_dim
        self.cache_width = 2 * config.kv_heads * config.head_dim
        self.mha_cache_width = 2 * config.heads * config.head_dim
        self.pair_flops = 4 * config.heads * config.head_dim
        self.scale = softmax_scale(config.head_dim, model.rope)
        self.q = nn.Linear(model.hidden_size, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(model.hidden_size, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(model.hidden_size, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * config.head_dim, model.hidden_size, bias=False)

    def _project(self, x_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = (t[..., None, :] for t in rope)
        q_BSHK = self.q(x_BSD).unflatten(-1, (self.heads, self.head_dim))
        k_BSGK = self.k(x_BSD).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BSGK = self.v(x_BSD).unflatten(-1, (self.kv_heads, self.head_dim))
        return rotary(q_BSHK, cos, sin), rotary(k_BSGK, cos, sin), v_BSGK

    def forward(self, x_BSD: Tensor, rope: Rope, starts_BS: Tensor | None) -> Tensor:
        q_BSHK, k_BSGK, v_BSGK = self._project(x_BSD, rope)
        return self.o(packed_attention(q_BSHK, k_BSGK, v_BSGK, starts_BS, self.scale).flatten(2))

    def extend(
        self, x_BQD: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch, starts_BQ: Tensor | None = None
    ) -> Tensor:
        """`starts_BQ`: the first position each new token sees, where that is not 0."""
        q_BQHK, k_BQGK, v_BQGK = self._project(x_BQD, rope)
        write_cache(cache_NW, torch.cat([k_BQGK.flatten(2), v_BQGK.flatten(2)], -1), batch)

        def cached(begin: int, end: int) -> tuple[Tensor, Tensor]:
            context_BLW = gather_context(cache_NW, batch, begin, end).to(q_BQHK.dtype)
            k_BLGK, v_BLGK = context_BLW.unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)
            return k_BLGK, v_BLGK

        out_BQHK = context_attention(
            q_BQHK, cached, batch.context, batch.positions_BQ, batch.lengths_B, self.scale, starts_BQ
        )
        return self.o(out_BQHK.flatten(2))


def build_gqa(config: GQAConfig, model: ModelConfig, layer: int) -> GroupedQueryAttention:
    """Grouped-query attention with rotary positions."""
    return GroupedQueryAttention(config, model)


def register(registry: Registry) -> None:
    registry.add("attention", "gqa", config=GQAConfig)(build_gqa)
