"""What the cache takes: bytes a token as allocated against the formula, and how many long contexts fit."""

from __future__ import annotations

import os
from typing import Any

import torch

from deepwright_core.engine import Engine
from deepwright_core.model.cost import GQA_KV_HEADS, Cost

LONG = 32768
USABLE = 0.9  # of the device: activations and the allocator's own need the rest


def cache_bytes_per_token(engine: Engine) -> float:
    """Bytes of the allocated cache for each token that it holds, the padding's block left out."""
    tensors = engine._runner.cache
    slots = engine.cache_capacity + engine._runner.block_size
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / slots


def device_bytes(device: torch.device) -> int:
    """All memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def concurrent_contexts(cost: Cost, engine: Engine, fp8_bytes: list[int | None]) -> dict[str, Any]:
    """How many contexts of LONG tokens fit beside the weights, for this model's cache and the plainer kinds of it."""
    weight = next(iter(engine.model.parameters()))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters())
    room = USABLE * device_bytes(weight.device) - weights
    kinds: dict[str, float | None] = {
        "this model": cost.cache_values * weight.element_size(),
        "this model, fp8": sum(size for size in fp8_bytes if size) if all(fp8_bytes) else None,
        f"GQA, {GQA_KV_HEADS} heads": cost.gqa_cache_values and cost.gqa_cache_values * weight.element_size(),
        "MHA": cost.mha_cache_values * weight.element_size(),
    }
    return {
        kind: {"bytes_per_token": size, "contexts": max(0, int(room // (LONG * size)))}
        for kind, size in kinds.items()
        if size
    }
