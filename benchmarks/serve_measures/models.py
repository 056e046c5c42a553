"""The models that are measured, with random weights made on the device itself."""

from __future__ import annotations

from typing import Any

import torch

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model, initialise
from deepwright_core.registry import Registry

MODELS: dict[str, dict[str, Any]] = {
    # conf/model/tiny.yaml with the vocabulary of the demonstration, which trains it on two CPU cores.
    "demo": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "layers": 3,
        "intermediate_size": 256,
        "first_dense_layers": 1,
        "max_positions": 2048,
        "tied_head": True,
        "init_std": 0.05,
        "mtp": {"depth": 1},
        "attention": {"name": "mla"},
        "ffn": {"name": "moe"},
    },
    # DeepSeek-V2-Lite's widths in 12 layers with V3's router: 6.65 billion parameters, 1.06 billion for a token.
    "lite12": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "layers": 12,
        "intermediate_size": 10944,
        "first_dense_layers": 1,
        "max_positions": 32768,
        "init_std": 0.02,
        "mtp": {"depth": 1},
        "attention": {
            "name": "mla",
            "heads": 16,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        "ffn": {"name": "moe", "experts": 64, "top_k": 6, "shared_experts": 2, "intermediate_size": 1408},
    },
}


def random_model(registry: Registry, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Weights drawn on the device, in the dtype that serves: no copy in float32 on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build_model(registry, config)
    finally:
        torch.set_default_dtype(before)
    initialise(model, config.init_std, torch.Generator(device).manual_seed(0))
    return model.to(device, dtype).eval()
