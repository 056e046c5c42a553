"""What the tests of rl share: a registry with core's and rl's components, and a tiny model with its engine."""

from __future__ import annotations

import pytest

from deepwright_core import plugin as core
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_rl import plugin as rl


@pytest.fixture(scope="session")
def registry() -> Registry:
    registry = Registry()
    core.deepwright_register(registry)
    rl.deepwright_register(registry)
    return registry


@pytest.fixture
def model(registry: Registry) -> Transformer:
    config = ModelConfig(
        vocab_size=24,
        hidden_size=16,
        layers=2,
        intermediate_size=24,
        max_positions=40,
        init_std=0.3,  # large enough that tokens have different probabilities
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 8},
        ffn={"name": "dense"},
    )
    return build_model(registry, config, seed=0)
