"""The published sizes of DeepSeek-V3, counted from `model=v3` on the meta device: nothing is allocated."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import Cost, estimate
from deepwright_core.model.description import describe
from deepwright_core.plugins import Plugins, installed
from deepwright_core.registry import parse
from flows import compose

from .test_published_layout import SIZES, stored_tensors

ATTENTION = 187_107_328
EXPERT = 3 * 7168 * 2048
EMBEDDING = 129280 * 7168


@functools.cache
def plugins() -> Plugins:
    return installed()


def config(**changes: Any) -> ModelConfig:
    section = compose.compose(["model=v3"], plugins())["model"]
    return parse(ModelConfig, {**section, **changes}, "model", plugins().registry)


@functools.cache
def cost() -> Cost:
    return estimate(plugins().registry, config())


@functools.cache
def figures() -> dict[str, Any]:
    return describe(plugins().registry, config())


def test_an_expert_is_44_million() -> None:
    fewer = {**config().ffn, "experts": 248}
    without = estimate(plugins().registry, config(ffn=fewer))
    # 8 experts less in each of 58 layers, and 8 rows less of each router.
    assert cost().parameters_total - without.parameters_total == 58 * 8 * (EXPERT + 7168)
    assert EXPERT == 44_040_192 == figures()["experts"]["parameters_each"]


def test_the_main_model_is_671_billion() -> None:
    norms = 61 * 2 * 7168 + 7168
    mixtures = 58 * (257 * EXPERT + 256 * 7168)
    dense = 3 * 3 * 7168 * 18432
    assert cost().parameters_total == 2 * EMBEDDING + 61 * ATTENTION + dense + mixtures + norms
    assert cost().parameters_total / 1e9 == pytest.approx(671.026, abs=5e-4)


def test_each_part_has_its_own() -> None:
    parts = {name: (part["total"], part["active"]) for name, part in figures()["parts"].items()}
    norms = 61 * 2 * 7168 + 7168
    assert parts == {
        "embedding": (EMBEDDING, EMBEDDING),
        "head": (EMBEDDING, EMBEDDING),
        "attention": (61 * ATTENTION, 61 * ATTENTION),
        "dense_ffn": (3 * 3 * 7168 * 18432,) * 2,
        "routed_experts": (58 * 256 * EXPERT, 58 * 8 * EXPERT),
        "shared_experts": (58 * EXPERT, 58 * EXPERT),
        "routers": (58 * 256 * 7168,) * 2,
        "norms": (norms, norms),
    }


def test_the_mtp_module_with_the_copies_of_a_checkpoint_makes_684_billion() -> None:
    """Ours shares embedding and head; published checkpoints hold a copy of both."""
    block = ATTENTION + 257 * EXPERT + 256 * 7168 + 2 * 7168
    assert cost().parameters_mtp == block + 2 * 7168 * 7168 + 3 * 7168
    published = cost().parameters_total + cost().parameters_mtp + 2 * EMBEDDING
    assert published == figures()["parameters_total_with_mtp_copies"]
    assert published / 1e9 == pytest.approx(684.49, abs=5e-3)


def test_37_billion_work_for_one_token() -> None:
    assert cost().parameters_active == cost().parameters_total - 58 * 248 * EXPERT
    assert cost().parameters_active / 1e9 == pytest.approx(37.55, abs=5e-3)


def test_the_experts() -> None:
    experts = figures()["experts"]
    assert (experts["routed"], experts["top_k"], experts["shared"], experts["layers"]) == (256, 8, 1, 58)
    assert experts["sparsity"] == 32
    assert experts["active_share"] == pytest.approx(37.55 / 671.026, rel=1e-3)


def test_the_cache_of_a_token() -> None:
    assert figures()["kv_bytes_per_token"] == 61 * 576 * 2 == 70_272
    # Plain multi-head attention with 128 heads of 128: 3.998 MB. Eight heads for keys and values: a sixteenth of it.
    assert figures()["kv_bytes_per_token_mha"] == 61 * 2 * 128 * 128 * 2 == 3_997_696
    assert figures()["kv_bytes_per_token_gqa"] == 61 * 2 * 8 * 128 * 2 == 249_856
    assert figures()["kv_saving"] == pytest.approx(1 - 70_272 / 3_997_696)
    assert figures()["kv_cache"]["contexts"] == [
        {"tokens": length, "model": 70_272 * length, "mha": 3_997_696 * length, "gqa": 249_856 * length}
        for length in (32_768, 163_840)
    ]


@pytest.mark.parametrize("context", [1, 4096, 163_840])
def test_flops_of_one_token(context: int) -> None:
    """2 for each weight that is multiplied (the embedding is looked up), and each head's scores and mix: over keys of
    192 and values of 128, and in the absorbed form of decoding over 576 and 512 cached values."""
    of_context = describe(plugins().registry, config(), context)
    multiplied = cost().parameters_active - EMBEDDING - (61 * 2 * 7168 + 7168) - 61 * (1536 + 512)
    pairs = 61 * 128 * 2 * context
    assert of_context["flops_per_token"] == pytest.approx(2 * multiplied + pairs * (192 + 128), rel=1e-9)
    assert of_context["flops_per_token_decode"] == pytest.approx(2 * multiplied + pairs * (576 + 512), rel=1e-9)


def test_training_multiplies_the_mtp_module_and_the_head_again() -> None:
    multiplied = cost().parameters_active - EMBEDDING - (61 * 2 * 7168 + 7168) - 61 * (1536 + 512)
    module = ATTENTION - 2048 + 9 * EXPERT + 256 * 7168 + 2 * 7168 * 7168 + EMBEDDING
    pairs = 62 * 128 * 2 * (192 + 128) * 2048  # half of 4096 on average
    assert figures()["flops_per_token_training"] == pytest.approx(3 * (2 * (multiplied + module) + pairs), rel=1e-9)


def test_fp8_weights_are_as_large_as_the_published_files() -> None:
    """Less the module of multi-token prediction, and the balancing biases, which are no weights."""
    stored = [
        SIZES[dtype] * math.prod(shape)
        for name, (dtype, shape) in stored_tensors().items()
        if ".layers.61." not in name and not name.endswith("e_score_correction_bias")
    ]
    memory = figures()["memory"]["inference"]
    assert memory["fp8"]["weights"] == sum(stored)
    assert memory["bf16"]["weights"] == 2 * cost().parameters_total
    assert memory["fp8"]["total"] == memory["fp8"]["weights"] + 4096 * 70_272


def test_training_keeps_18_bytes_a_parameter() -> None:
    training = figures()["memory"]["training"]
    assert training["parameters"] == cost().parameters_total + cost().parameters_mtp
    assert training["total"] == 18 * training["parameters"]
    assert training["total"] == sum(size for name, size in training.items() if name.endswith(("_bf16", "_fp32")))
