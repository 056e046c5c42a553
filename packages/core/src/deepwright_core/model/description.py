"""A model in figures: what `deepwright model show` tells, as plain data.

Bytes are exact counts; nothing is measured, and activations are left out, since they depend on the batch and on what
is recomputed.
"""

from __future__ import annotations

from typing import Any

from ..errors import RequestError
from ..registry import Registry
from .config import ModelConfig
from .cost import GQA_KV_HEADS, Cost, estimate

BF16_BYTES = 2
FP32_BYTES = 4
USUAL_CONTEXT = 4096
LONG_CONTEXT = 32768
# Mixed-precision training as it is usually done: what each parameter needs, in bytes.
TRAINING_BYTES = {
    "weights_bf16": BF16_BYTES,
    "gradients_fp32": FP32_BYTES,
    "master_weights_fp32": FP32_BYTES,
    "adamw_moments_fp32": 2 * FP32_BYTES,
}


def describe(registry: Registry, config: ModelConfig, context: int | None = None) -> dict[str, Any]:
    """The figures of a model; `context` (4096, or all that the model has) is what arithmetic and memory are told for.

    The keys that are not nested are bytes of bf16 and FLOPs of one token.
    """
    context = min(USUAL_CONTEXT, config.max_positions) if context is None else context
    if not 1 <= context <= config.max_positions:
        raise RequestError(
            f"context is {context}; expected between 1 and model.max_positions, which is {config.max_positions}."
        )
    cost = estimate(registry, config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layers": config.layers,
        "max_positions": config.max_positions,
        "parameters_total": cost.parameters_total,
        "parameters_active": cost.parameters_active,
        "parameters_mtp": cost.parameters_mtp,
        "parameters_total_with_mtp_copies": cost.parameters_total + cost.parameters_mtp + cost.mtp_copies,
        "parameters_total_without_embeddings": cost.parameters_total - _embeddings(cost),
        "parameters_active_without_embeddings": cost.parameters_active - _embeddings(cost),
        "parts": {name: {"total": part.total, "active": part.active} for name, part in cost.parts.items()},
        "tied_head": config.tied_head,
        "mtp": {
            "depth": config.mtp.depth,
            "parameters": cost.parameters_mtp,
            "copies_in_checkpoints": cost.mtp_copies,
        },
        "experts": _experts(cost),
        "kv_bytes_per_token": cost.cache_values * BF16_BYTES,
        "kv_bytes_per_token_mha": cost.mha_cache_values * BF16_BYTES,
        "kv_bytes_per_token_gqa": None if cost.gqa_cache_values is None else cost.gqa_cache_values * BF16_BYTES,
        "kv_saving": 1 - cost.cache_values / cost.mha_cache_values,
        "kv_cache": _cache(cost, config),
        "context": context,
        "flops_per_token": round(cost.forward_flops(1, context)),
        "flops_per_token_decode": round(cost.decode_flops(context)),
        "flops_per_token_training": round(cost.training_flops(1, context)),
        "memory": {"inference": _inference(cost, context), "training": _training(cost)},
    }


def _embeddings(cost: Cost) -> int:
    return cost.parts["embedding"].total + cost.parts["head"].total


def _experts(cost: Cost) -> dict[str, Any] | None:
    """How many experts, and how few of them work; None for a dense model."""
    mixture = cost.mixture
    if mixture is None:
        return None
    return {
        "routed": mixture.experts,
        "top_k": mixture.top_k,
        "shared": mixture.shared,
        "layers": cost.mixture_layers,
        "parameters_each": cost.parts["routed_experts"].total // (mixture.experts * cost.mixture_layers),
        "sparsity": mixture.experts / mixture.top_k,
        "active_share": cost.parameters_active / cost.parameters_total,
    }


def _cache(cost: Cost, config: ModelConfig) -> dict[str, Any]:
    """Bytes that whole contexts keep, in bf16, beside those of other attentions with the same heads."""
    widths = {"model": cost.cache_values, "mha": cost.mha_cache_values}
    if cost.gqa_cache_values is not None:
        widths["gqa"] = cost.gqa_cache_values
    lengths = sorted({min(LONG_CONTEXT, config.max_positions), config.max_positions})
    return {
        "dtype": "bf16",
        "gqa_kv_heads": GQA_KV_HEADS,
        "contexts": [
            {"tokens": length, **{name: width * BF16_BYTES * length for name, width in widths.items()}}
            for length in lengths
        ],
    }


def _inference(cost: Cost, context: int) -> dict[str, Any]:
    """Weights (without MTP modules) and the cache of one sequence."""
    cache = cost.cache_values * BF16_BYTES * context
    wide = cost.parameters_total - cost.fp8_weights
    weights = {
        "bf16": cost.parameters_total * BF16_BYTES,
        "fp8": cost.fp8_weights + cost.fp8_blocks * FP32_BYTES + wide * BF16_BYTES,
    }
    return {
        "context": context,
        **{dtype: {"weights": size, "cache": cache, "total": size + cache} for dtype, size in weights.items()},
    }


def _training(cost: Cost) -> dict[str, Any]:
    """Everything that stays between steps, MTP modules included; no activations."""
    parameters = cost.parameters_total + cost.parameters_mtp
    sizes = {name: each * parameters for name, each in TRAINING_BYTES.items()}
    return {
        "parameters": parameters,
        "bytes_per_parameter": sum(TRAINING_BYTES.values()),
        **sizes,
        "total": sum(sizes.values()),
    }
