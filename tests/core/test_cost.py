"""What a model costs: every figure by hand for a small dense one, and equal to the model that is really built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import count, describe, estimate
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import Registry

ATTENTION = 10 * 4 * 6 + 2 * 10 * 2 * 6 + 4 * 6 * 10  # q, k and v, o
DENSE = 3 * 10 * 16
EMBEDDING = 50 * 10


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 10, "layers": 3, "intermediate_size": 16}
    attention = {"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6}
    return ModelConfig(**sizes, attention=attention, ffn={"name": "dense"}, **changes)


def test_a_dense_model_by_hand(registry: Registry) -> None:
    cost = estimate(registry, config())
    matrices = 3 * (ATTENTION + DENSE)
    assert cost.parameters_total == cost.parameters_active == 2 * EMBEDDING + matrices + 3 * 2 * 10 + 10
    assert cost.parameters_mtp == 0
    assert cost.matmul_active == matrices + EMBEDDING  # the head multiplies, the embedding is looked up
    assert cost.cache_values == 3 * 2 * 2 * 6
    assert cost.mha_cache_values == 3 * 2 * 4 * 6
    assert cost.pair_flops == 3 * 4 * (2 * 6 + 2 * 6)
    assert cost.forward_flops(7, 5.0) == 7 * (2 * (matrices + EMBEDDING) + 5 * 3 * 4 * 24)
    assert cost.training_flops(7, 10) == 3 * cost.forward_flops(7, 5.0)


def test_a_tied_head_is_held_once_and_multiplied_once(registry: Registry) -> None:
    tied, apart = estimate(registry, config(tied_head=True)), estimate(registry, config())
    assert apart.parameters_total - tied.parameters_total == EMBEDDING
    assert tied.matmul_active == apart.matmul_active


def test_mtp_modules_are_counted_apart_and_multiply_the_head_again(registry: Registry) -> None:
    with_mtp, without = estimate(registry, config(mtp={"depth": 2})), estimate(registry, config())
    module = 2 * 10 * 10 + ATTENTION + DENSE
    assert with_mtp.parameters_mtp == 2 * (module + 5 * 10)
    assert with_mtp.parameters_total == without.parameters_total
    assert with_mtp.matmul_active - without.matmul_active == 2 * (module + EMBEDDING)
    assert with_mtp.pair_flops == without.pair_flops // 3 * 5
    assert with_mtp.cache_values == without.cache_values  # they are not used for generation


@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, {"mtp": {"depth": 1}}])
def test_the_estimate_is_the_count_of_the_built_model(registry: Registry, changes: dict[str, Any]) -> None:
    model = build_model(registry, config(**changes), seed=0)
    cost = count(model)
    assert cost == estimate(registry, config(**changes))
    assert cost.parameters_total + cost.parameters_mtp == sum(p.numel() for p in model.parameters())
    assert cost.cache_values == sum(model.cache_widths)


def test_the_description_says_what_people_ask(registry: Registry) -> None:
    figures, cost = describe(registry, config(), context=100), estimate(registry, config())
    assert figures["kv_bytes_per_token"] == 72 * 2
    assert figures["kv_saving"] == 0.5
    assert figures["flops_per_token"] == cost.forward_flops(1, 100)
    assert figures["flops_per_token_training"] == 3 * cost.forward_flops(1, 50)
    assert figures["parameters_active"] == cost.parameters_active


def test_forward_flops_are_those_that_torch_counts(registry: Registry) -> None:
    model, tokens = build_model(registry, config(), seed=0), torch.randint(50, (2, 8))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    assert counter.get_total_flops() == count(model).forward_flops(16, 8)  # torch counts every pair, masked or not
