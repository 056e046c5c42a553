"""Multi-head latent attention (DeepSeek-V2 report, section 2.1; V3 report, eq. 1-11).

Keys and values of all heads are projections of one small latent per token, so decoding caches only the latent and one
shared rope key. Two forms of the same function:

- training and long prefill: the latent is expanded to keys and values of every head;
- decode: the expansion is *absorbed* into query and output, so that all heads read the latent cache directly
  (multi-query attention with key width C + R and value width C); few tokens of a small model on a CPU go through
  `few_queries`.

The cache holds latents in the model's dtype, or in FP8 with the rope key in bfloat16 (`mla_paged_decode` has the
layout). Leaves out sparse attention (a variant of its own).

Shapes: B sequences, S tokens, Q new tokens, D hidden, H heads, P key width without position, R rope width, V value
width, C latent width, N cache slots, L longest context, F = R / 2 rope pairs, T = B · Q, X and Y what goes into and
comes out of a head's own matrix.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from deepwright_core.model.attention import Rope, gather_context
from deepwright_core.model.branches import side_by_side
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.correction import Correction
from deepwright_core.model.few_rows import MOST_VALUES, AttentionForm, is_plain
from deepwright_core.model.norm import RMSNorm
from deepwright_core.model.rope import softmax_scale
from deepwright_core.registry import ComponentConfig
from deepwright_kernels import (
    context_attention,
    latent_cache_write,
    mla_paged_decode,
    packed_attention,
    rotary,
    rotary_tail,
)
from deepwright_kernels.mla_paged_decode.reference import SCALED_LATENTS, fp8_row_bytes, unpack_fp8_latents
from deepwright_kernels.row_by_row import is_row_by_row

from .few_queries import FewQueries

# What absorbed decode multiplies by itself.
EXPANSION = "kv_b.weight"

# Up to this many new tokens a sequence reads the latent cache absorbed; more tokens share the cost of expanding it.
ABSORBED_QUERIES = 4


class MLAConfig(ComponentConfig):
    """Multi-head latent attention. `q_lora_rank: 0` means a full query projection (V2-Lite, Moonlight).

    latent_norm_eps: of the norms on the query's and the cache's latent. The published modelling code takes 1e-6 there,
    whatever the model's own norms have (Moonlight's have 1e-5).
    """

    name: str = "mla"
    heads: int = Field(8, ge=1)
    q_lora_rank: int = Field(0, ge=0)
    kv_lora_rank: int = Field(32, ge=1)
    qk_nope_head_dim: int = Field(16, ge=1)
    qk_rope_head_dim: int = Field(16, ge=2, multiple_of=2)
    v_head_dim: int = Field(16, ge=1)
    latent_norm_eps: float = Field(1e-6, gt=0)


def for_heads(rope: Rope) -> Rope:
    """cos and sin [B, S, 1, F] that all heads share."""
    cos, sin = rope
    return cos[..., None, :], sin[..., None, :]


def per_head(x_BQHX: Tensor, weight_HXY: Tensor) -> Tensor:
    """Each head's vector times its own matrix: [B, Q, H, X] -> [B, Q, H, Y]."""
    x_HTX = x_BQHX.flatten(0, 1).transpose(0, 1)
    y_THY = x_HTX.new_empty(x_HTX.shape[1], *weight_HXY.shape[::2])
    torch.bmm(x_HTX, weight_HXY, out=y_THY.transpose(0, 1))  # written where it belongs: nobody has to move it
    return y_THY.unflatten(0, x_BQHX.shape[:2])


class LatentAttention(nn.Module):
    """MLA. Query and key heads are laid out [nope | rope], as in the published checkpoints."""

    own_products: ClassVar = (EXPANSION,)

    def __init__(self, config: MLAConfig, model: ModelConfig) -> None:
        super().__init__()
        self.corrections: dict[str, Correction] = {}
        self.heads = config.heads
        self.nope_dim, self.rope_dim, self.value_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.latent_dim = config.kv_lora_rank
        self.cache_width = config.kv_lora_rank + config.qk_rope_head_dim
        whole_scales = config.kv_lora_rank % SCALED_LATENTS == 0
        self.fp8_cache_bytes = fp8_row_bytes(self.latent_dim, self.rope_dim) if whole_scales else None
        self.mha_cache_width = self.heads * (self.nope_dim + self.value_dim)
        self.pair_flops = 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim)
        self.pair_flops_decode = 2 * self.heads * (self.cache_width + self.latent_dim)
        self.scale = softmax_scale(self.nope_dim + self.rope_dim, model.rope)
        query_width = self.heads * (self.nope_dim + self.rope_dim)
        if config.q_lora_rank:
            self.q_a = nn.Linear(model.hidden_size, config.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b = nn.Linear(config.q_lora_rank, query_width, bias=False)
        else:
            self.q = nn.Linear(model.hidden_size, query_width, bias=False)
        self.q_lora = bool(config.q_lora_rank)
        self.kv_a = nn.Linear(model.hidden_size, self.cache_width, bias=False)
        self.kv_norm = RMSNorm(self.latent_dim, config.latent_norm_eps)
        self.kv_b = nn.Linear(self.latent_dim, self.heads * (self.nope_dim + self.value_dim), bias=False)
        self.o = nn.Linear(self.heads * self.value_dim, model.hidden_size, bias=False)

    def _queries(self, x_BSD: Tensor) -> Tensor:
        """Queries of every head, [nope | rope], not yet rotated: [B, S, H, P + R]."""
        query = self.q_b(self.q_norm(self.q_a(x_BSD))) if self.q_lora else self.q(x_BSD)
        return query.unflatten(-1, (self.heads, -1))

    def _latents(self, x_BSD: Tensor, rope: Rope) -> Tensor:
        """What the cache holds of each token: normed latent, then the rotated shared rope key (which has no norm)."""
        latent_BSC, rope_BSR = self.kv_a(x_BSD).split([self.latent_dim, self.rope_dim], -1)
        return torch.cat([self.kv_norm(latent_BSC), rotary(rope_BSR, *rope)], -1)

    def _expand(self, cached_BLW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, L, H, P + R] and values [B, L, H, V] of every head from cached latents."""
        latent_BLC, rope_BLR = cached_BLW.split([self.latent_dim, self.rope_dim], -1)
        k_BLHP, v_BLHV = (
            self.kv_b(latent_BLC).unflatten(-1, (self.heads, -1)).split([self.nope_dim, self.value_dim], -1)
        )
        shared_BLHR = rope_BLR[:, :, None].expand(-1, -1, self.heads, -1)
        if torch.is_grad_enabled():
            return torch.cat([k_BLHP, shared_BLHR], -1), v_BLHV
        # Two copies: a GPU's `cat` takes four times as long over rows of this kind.
        k_BLHK = k_BLHP.new_empty(*k_BLHP.shape[:-1], self.nope_dim + self.rope_dim)
        k_BLHK[..., : self.nope_dim] = k_BLHP
        k_BLHK[..., self.nope_dim :] = shared_BLHR
        return k_BLHK, v_BLHV

    def _cached(self, rows_BLW: Tensor) -> Tensor:
        """What `_latents` gave for these rows of the cache, unpacked if it holds FP8 latents."""
        if rows_BLW.dtype != torch.uint8:
            return rows_BLW
        parts = unpack_fp8_latents(rows_BLW.flatten(0, 1), self.latent_dim)
        return torch.cat(parts, -1).unflatten(0, rows_BLW.shape[:2])

    def _attend_expanded(self, q_BQHK: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch) -> Tensor:
        """Attention over the context's keys and values, which are expanded a slice at a time."""
        q_BQHK = rotary_tail(q_BQHK, *for_heads(rope))

        def expand(begin: int, end: int) -> tuple[Tensor, Tensor]:
            rows_BLW = gather_context(cache_NW, batch, begin, end)
            return self._expand(self._cached(rows_BLW).to(q_BQHK.dtype))

        return context_attention(q_BQHK, expand, batch.context, batch.positions_BQ, batch.lengths_B, self.scale)

    def _attend_absorbed(self, q_BQHK: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch) -> Tensor:
        """q·(W_k c) = (W_kᵀ q)·c, and Σ p (W_v c) = W_v (Σ p c): attention over the latents themselves."""
        nope_BQHP, rope_BQHR = q_BQHK.split([self.nope_dim, self.rope_dim], -1)
        weight_HXC = self.kv_b.weight.unflatten(0, (self.heads, -1))
        key_HPC, value_HVC = weight_HXC.to(nope_BQHP.dtype).split([self.nope_dim, self.value_dim], 1)
        latent_BQHC = per_head(nope_BQHP, key_HPC)
        correction = self.corrections.get(EXPANSION)
        if correction is not None:
            b_HYX = correction.b_NX.unflatten(0, (self.heads, -1))
            key_HPX, value_HVX = b_HYX.split([self.nope_dim, self.value_dim], 1)
            low_BQHX = per_head(nope_BQHP, key_HPX)
            latent_BQHC = latent_BQHC + (low_BQHX * correction.mask(low_BQHX)) @ correction.a_XK
        mixed_BQHC = mla_paged_decode(
            latent_BQHC,
            rotary(rope_BQHR, *for_heads(rope)),
            cache_NW,
            batch.blocks_BP,
            batch.positions_BQ,
            batch.lengths_B,
            batch.block_size,
            self.scale,
        )
        out_BQHV = per_head(mixed_BQHC, value_HVC.transpose(1, 2))
        if correction is not None:
            low_BQHX = mixed_BQHC @ correction.a_XK.T
            out_BQHV = out_BQHV + per_head(low_BQHX * correction.mask(low_BQHX), value_HVX.transpose(1, 2))
        return out_BQHV

    def forward(self, x_BSD: Tensor, rope: Rope, starts_BS: Tensor | None) -> Tensor:
        q_BSHK = rotary_tail(self._queries(x_BSD), *for_heads(rope))
        k_BSHK, v_BSHV = self._expand(self._latents(x_BSD, rope))
        return self.o(packed_attention(q_BSHK, k_BSHK, v_BSHV, starts_BS, self.scale).flatten(2))

    def _write(self, x_BQD: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch) -> None:
        """Cache what later tokens see of these."""
        cos_TF, sin_TF = (angle_BQF.flatten(0, 1) for angle_BQF in rope)
        latent_cache_write(
            self.kv_a(x_BQD).flatten(0, 1),
            self.kv_norm.weight,
            self.kv_norm.eps,
            cos_TF,
            sin_TF,
            cache_NW,
            batch.slots_BQ.flatten(),
        )

    def extend(self, x_BQD: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch) -> Tensor:
        q_BQHK, _ = side_by_side(
            lambda: self._queries(x_BQD), lambda: self._write(x_BQD, rope, cache_NW, batch), x_BQD.device
        )
        absorbed = x_BQD.shape[1] <= ABSORBED_QUERIES or is_row_by_row()  # then decoding and prefill have one form
        attend = self._attend_absorbed if absorbed else self._attend_expanded
        return self.o(attend(q_BQHK, rope, cache_NW, batch).flatten(2))

    def few_rows_form(self) -> AttentionForm | None:
        """For a decode step of few rows on a CPU (`deepwright_core.model.few_rows`), where the matrices are small."""
        if self.q_lora or self.corrections or self.latent_dim % 2:
            return None
        if not all(map(is_plain, (self.q, self.kv_a, self.kv_b, self.o))):
            return None
        values = self.o.out_features * (self.heads * (self.cache_width + self.latent_dim) + self.cache_width)
        return FewQueries(self) if values <= MOST_VALUES else None


def build_mla(config: MLAConfig, model: ModelConfig, layer: int) -> LatentAttention:
    """Multi-head latent attention: caches one latent and one rope key per token."""
    return LatentAttention(config, model)
