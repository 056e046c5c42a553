"""What a model costs before it is built for real: parameters, cache values, FLOPs.

Everything is counted from the modules themselves, on the meta device: a plugin's attention is counted like a built-in
one. Modules say what cannot be seen from their weights:

- `parts`: to which part of the model the weights of each child belong ("routers", "routed_experts", ...);
- `active_share`: the share of its weights that works for one token (routed experts: top_k / E);
- `mixture`, of a feed-forward that has one: how many experts, how many for a token, how many for every token;
- what the attention protocol asks: FLOPs for a pair of query and key, values cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..registry import Registry
from .config import ModelConfig
from .feed_forward import Mixture
from .transformer import Transformer, build_model

PARTS = (
    "embedding",
    "head",
    "attention",
    "dense_ffn",
    "routed_experts",
    "shared_experts",
    "routers",
    "norms",
)
# Published FP8 checkpoints keep embedding, head, routers and norms in bf16, and one scale for a block of 128 x 128.
FP8_PARTS = frozenset({"attention", "dense_ffn", "routed_experts", "shared_experts"})
FP8_BLOCK = 128
# How many key-value heads the usual grouped-query model has (Llama 3, Qwen2.5), for comparison.
GQA_KV_HEADS = 8


@dataclass(frozen=True)
class Part:
    """Weights of one part of the model, and how many of them work for one token."""

    total: int = 0
    active: int = 0


@dataclass(frozen=True)
class Cost:
    """All without the MTP modules, which generation does not use, but for what is called mtp.

    parts: weights by part of the model. mtp_copies: weights that a published checkpoint repeats in its MTP modules
    (each has the embedding and the head once more). matmul_*: weights that one token multiplies (embedding look-up
    excluded, head included also when tied, and once more for each MTP module). pair_flops*: FLOPs for each pair of
    query and visible key, all layers, in the form of training and prefill, and in that of decoding. *cache_values: kept
    per token, by this model, by plain multi-head attention with its heads, and by grouped-query attention
    with `GQA_KV_HEADS` of them for keys and values (None where an attention does not say how many heads it has).
    fp8_weights, fp8_blocks: weights that an FP8 checkpoint stores in a byte, and the blocks that have a scale.
    """

    parts: dict[str, Part]
    parameters_mtp: int
    mtp_copies: int
    mixture: Mixture | None
    mixture_layers: int
    matmul_active: float
    matmul_mtp: float
    pair_flops: int
    pair_flops_mtp: int
    pair_flops_decode: int
    cache_values: int
    mha_cache_values: int
    gqa_cache_values: int | None
    fp8_weights: int
    fp8_blocks: int

    @property
    def parameters_total(self) -> int:
        return sum(part.total for part in self.parts.values())

    @property
    def parameters_active(self) -> int:
        """Weights that work for one token, embedding and head included."""
        return sum(part.active for part in self.parts.values())

    def forward_flops(self, tokens: int, context: float) -> float:
        """FLOPs of a forward pass over `tokens` tokens which see `context` keys on average."""
        return tokens * (2.0 * self.matmul_active + self.pair_flops * context)

    def decode_flops(self, context: float) -> float:
        """FLOPs of generating one token which sees `context` cached ones."""
        return 2.0 * self.matmul_active + self.pair_flops_decode * context

    def training_flops(self, tokens: int, sequence_length: int) -> float:
        """FLOPs of forward and backward (twice the forward) over packed causal sequences, MTP modules included."""
        further = tokens * (2.0 * self.matmul_mtp + self.pair_flops_mtp * sequence_length / 2)
        return 3.0 * (self.forward_flops(tokens, sequence_length / 2) + further)


def _places(module: nn.Module, prefix: str, part: str, share: float) -> Iterator[tuple[str, tuple[str, float]]]:
    """(name, (part, share that works for one token)) of every parameter. What is said nearest to it holds."""
    parts: dict[str, str] = getattr(module, "parts", {})
    share = getattr(module, "active_share", share)
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name, (part, share)
    for name, child in module.named_children():
        yield from _places(child, f"{prefix}{name}.", parts.get(name, part), share)


def _blocks(shape: torch.Size) -> int:
    rows, columns = shape[-2:]
    return math.prod(shape[:-2]) * math.ceil(rows / FP8_BLOCK) * math.ceil(columns / FP8_BLOCK)


def _gqa_values(attentions: list[Any]) -> int | None:
    """What grouped-query attention would keep per token, with the width that each head has here."""
    if not all(hasattr(attention, "heads") for attention in attentions):
        return None
    return sum(each.mha_cache_width // each.heads * min(GQA_KV_HEADS, each.heads) for each in attentions)


def count(model: Transformer) -> Cost:
    """Count a built model (also one on the meta device)."""
    places = dict(_places(model, "", "other", 1.0))
    totals, actives = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    parameters_mtp = fp8_weights = fp8_blocks = 0
    matmul = matmul_mtp = 0.0
    for name, parameter in model.named_parameters():
        (part, share), size = places[name], parameter.numel()
        multiplied = size * share if parameter.dim() > 1 and part != "embedding" else 0.0
        if name.startswith("mtp."):
            parameters_mtp += size
            matmul_mtp += multiplied
            continue
        totals[part] = totals.get(part, 0) + size
        actives[part] = actives.get(part, 0) + round(size * share)
        matmul += multiplied
        if part in FP8_PARTS and parameter.dim() > 1:
            fp8_weights += size
            fp8_blocks += _blocks(parameter.shape)
    embedding, depth = model.embedding.weight.numel(), model.config.mtp.depth
    if model.config.tied_head:
        matmul += embedding
    blocks: list[Any] = list(model.layers)
    attentions = [block.attention for block in blocks]
    mixtures = [block.ffn.mixture for block in blocks if hasattr(block.ffn, "mixture")]
    return Cost(
        parts={part: Part(total, actives[part]) for part, total in totals.items()},
        parameters_mtp=parameters_mtp,
        mtp_copies=depth * 2 * embedding,
        mixture=mixtures[0] if mixtures else None,
        mixture_layers=len(mixtures),
        matmul_active=matmul,
        matmul_mtp=matmul_mtp + depth * embedding,
        pair_flops=sum(attention.pair_flops for attention in attentions),
        pair_flops_mtp=sum(module.block.attention.pair_flops for module in model.mtp),  # type: ignore[union-attr, misc]
        pair_flops_decode=sum(getattr(each, "pair_flops_decode", each.pair_flops) for each in attentions),
        cache_values=sum(model.cache_widths),
        mha_cache_values=sum(attention.mha_cache_width for attention in attentions),
        gqa_cache_values=_gqa_values(attentions),
        fp8_weights=fp8_weights,
        fp8_blocks=fp8_blocks,
    )


def estimate(registry: Registry, config: ModelConfig) -> Cost:
    """Count a model from its config alone, without memory for its weights."""
    with torch.device("meta"):
        return count(build_model(registry, config))
