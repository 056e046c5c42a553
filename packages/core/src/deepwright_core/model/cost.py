"""What a model costs before it is built for real: parameters, cache bytes, FLOPs.

Everything is counted from the modules themselves, on the meta device: a plugin's attention is counted like a built-in
one. A module whose weights only partly work for each token says so with `active_share` (routed experts: top_k / E);
an attention says its score-and-mix FLOPs per query-key pair with `pair_flops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..registry import Registry
from .attention import Attention
from .config import ModelConfig
from .transformer import Block, Transformer, build_model

BF16_BYTES = 2


@dataclass(frozen=True)
class Cost:
    """parameters_*: counts. matmul_active: weights that one token multiplies (embedding look-up excluded, head included
    also when tied). pair_flops: FLOPs for each pair of query and visible key, all layers. cache_values: per token."""

    parameters_total: int
    parameters_active: int
    parameters_mtp: int
    matmul_active: float
    pair_flops: int
    cache_values: int
    mha_cache_values: int

    def forward_flops(self, tokens: int, context: float) -> float:
        """FLOPs of a forward pass over `tokens` tokens which see `context` keys on average."""
        return tokens * (2.0 * self.matmul_active + self.pair_flops * context)

    def training_flops(self, tokens: int, sequence_length: int) -> float:
        """FLOPs of forward and backward (twice the forward) over packed causal sequences, MTP modules included."""
        return 3.0 * self.forward_flops(tokens, sequence_length / 2)


def _shares(model: nn.Module) -> dict[str, float]:
    """The share of each parameter that works for one token."""
    shares: dict[str, float] = {}
    for prefix, module in model.named_modules():
        share = getattr(module, "active_share", None)
        if isinstance(share, float):
            for name, _ in module.named_parameters(prefix):
                shares[name] = share
    return shares


def count(model: Transformer) -> Cost:
    """Count a built model (also one on the meta device)."""
    shares = _shares(model)
    total = active = mtp = 0
    matmul = 0.0
    for name, parameter in model.named_parameters():
        size, share = parameter.numel(), shares.get(name, 1.0)
        if name.startswith("mtp."):
            mtp += size
        else:
            total += size
            active += round(size * share)
        if parameter.dim() > 1 and not name.startswith("embedding."):
            matmul += size * share
    if model.config.tied_head:
        matmul += model.embedding.weight.numel()
    # Each MTP module multiplies the head once more.
    matmul += model.config.mtp.depth * model.embedding.weight.numel()
    blocks: list[Any] = [*model.layers, *(module.block for module in model.mtp)]
    pairs = sum(block.attention.pair_flops for block in blocks)
    attentions: list[Attention] = [block.attention for block in model.layers if isinstance(block, Block)]  # type: ignore[misc]
    return Cost(
        total,
        active,
        mtp,
        matmul,
        pairs,
        sum(model.cache_widths),
        sum(attention.mha_cache_width for attention in attentions),
    )


def estimate(registry: Registry, config: ModelConfig) -> Cost:
    """Count a model from its config alone, without memory for its weights."""
    with torch.device("meta"):
        return count(build_model(registry, config))


def describe(registry: Registry, config: ModelConfig, context: int = 4096) -> dict[str, Any]:
    """The figures that `deepwright model show` prints; bytes are those of bf16, FLOPs those of one token."""
    cost = estimate(registry, config)
    return {
        "vocab_size": config.vocab_size,
        "layers": config.layers,
        "parameters_total": cost.parameters_total,
        "parameters_active": cost.parameters_active,
        "parameters_mtp": cost.parameters_mtp,
        "kv_bytes_per_token": cost.cache_values * BF16_BYTES,
        "kv_bytes_per_token_mha": cost.mha_cache_values * BF16_BYTES,
        "kv_saving": 1 - cost.cache_values / cost.mha_cache_values,
        "context": context,
        "flops_per_token": round(cost.forward_flops(1, context)),
        "flops_per_token_training": round(cost.training_flops(1, context)),
    }
