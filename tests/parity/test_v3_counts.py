"""The published size of DeepSeek-V3, counted on the meta device from our own modules: nothing is allocated."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import Cost, describe, estimate
from deepwright_core.plugins import installed
from deepwright_core.registry import parse

V3: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "layers": 61,
    "intermediate_size": 18432,
    "first_dense_layers": 3,
    "max_positions": 8,
    "rope": {"yarn": {"factor": 40, "original_positions": 4096}},
    "mtp": {"depth": 1},
    "attention": {
        "name": "mla",
        "heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "ffn": {
        "name": "moe",
        "experts": 256,
        "top_k": 8,
        "shared_experts": 1,
        "intermediate_size": 2048,
        "router": {"name": "noaux_tc", "groups": 8, "top_groups": 4, "scaling": 2.5},
    },
}
ATTENTION = 187_107_328
EXPERT = 3 * 7168 * 2048
EMBEDDING = 129280 * 7168


def config(**changes: Any) -> ModelConfig:
    return parse(ModelConfig, {**V3, **changes}, "model", installed().registry)


@functools.cache
def cost() -> Cost:
    return estimate(installed().registry, config())


def test_an_expert_is_44_million() -> None:
    fewer = {**V3["ffn"], "experts": 248}
    without = estimate(installed().registry, config(ffn=fewer, mtp={"depth": 0}))
    # 8 experts less in each of 58 layers, and 8 rows less of each router.
    assert cost().parameters_total - without.parameters_total == 58 * 8 * (EXPERT + 7168)
    assert EXPERT == 44_040_192


def test_the_main_model_is_671_billion() -> None:
    norms = 61 * 2 * 7168 + 7168
    mixtures = 58 * (257 * EXPERT + 256 * 7168)
    dense = 3 * 3 * 7168 * 18432
    assert cost().parameters_total == 2 * EMBEDDING + 61 * ATTENTION + dense + mixtures + norms
    assert cost().parameters_total / 1e9 == pytest.approx(671.026, abs=5e-4)


def test_the_mtp_module_with_the_copies_of_a_checkpoint_makes_684_billion() -> None:
    """Ours shares embedding and head; published checkpoints hold a copy of both."""
    block = ATTENTION + 257 * EXPERT + 256 * 7168 + 2 * 7168
    assert cost().parameters_mtp == block + 2 * 7168 * 7168 + 3 * 7168
    published = cost().parameters_total + cost().parameters_mtp + 2 * EMBEDDING
    assert published / 1e9 == pytest.approx(684.49, abs=5e-3)


def test_37_billion_work_for_one_token() -> None:
    assert cost().parameters_active == cost().parameters_total - 58 * 248 * EXPERT
    assert cost().parameters_active / 1e9 == pytest.approx(37.55, abs=5e-3)


def test_the_cache_of_a_token() -> None:
    figures = describe(installed().registry, config(mtp={"depth": 0}))
    assert figures["kv_bytes_per_token"] == 61 * 576 * 2 == 70_272
    # Plain multi-head attention with 128 heads of 128: 3.998 MB.
    assert figures["kv_bytes_per_token_mha"] == 61 * 2 * 128 * 128 * 2 == 3_997_696
    assert figures["kv_saving"] == pytest.approx(1 - 70_272 / 3_997_696)


def test_flops_of_one_token() -> None:
    """2 for each weight that is multiplied (the embedding is looked up), and each head's scores and mix."""
    figures = describe(installed().registry, config(mtp={"depth": 0}), context=4096)
    multiplied = cost().parameters_active - EMBEDDING - (61 * 2 * 7168 + 7168) - 61 * (1536 + 512)
    pairs = 61 * 128 * 2 * (192 + 128) * 4096
    assert figures["flops_per_token"] == pytest.approx(2 * multiplied + pairs, rel=1e-9)
