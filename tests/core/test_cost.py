"""What a model costs: every figure by hand for a small dense one, and equal to the model that is really built."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepwright_core import plugin
from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import Part, count, estimate
from deepwright_core.model.description import describe
from deepwright_core.model.feed_forward import DenseConfig, Mixture
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
    assert cost.parameters_mtp == cost.mtp_copies == cost.matmul_mtp == cost.pair_flops_mtp == 0
    assert cost.matmul_active == matrices + EMBEDDING  # the head multiplies, the embedding is looked up
    assert cost.cache_values == 3 * 2 * 2 * 6
    assert cost.mha_cache_values == 3 * 2 * 4 * 6
    assert cost.gqa_cache_values == 3 * 2 * 4 * 6  # it would have 8 key-value heads, and there are only 4
    assert cost.pair_flops == cost.pair_flops_decode == 3 * 4 * (2 * 6 + 2 * 6)
    assert cost.decode_flops(5.0) == cost.forward_flops(1, 5.0)
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
    assert with_mtp.mtp_copies == 2 * 2 * EMBEDDING
    assert with_mtp.matmul_mtp == 2 * (module + EMBEDDING)
    assert with_mtp.pair_flops_mtp == without.pair_flops // 3 * 2
    # They are not used for generation.
    assert with_mtp.cache_values == without.cache_values
    assert with_mtp.forward_flops(7, 5.0) == without.forward_flops(7, 5.0)
    more = with_mtp.training_flops(7, 10) - without.training_flops(7, 10)
    assert more == 3 * 7 * (2 * with_mtp.matmul_mtp + 5 * with_mtp.pair_flops_mtp)


def test_every_weight_belongs_to_a_part(registry: Registry) -> None:
    parts = {name: part.total for name, part in estimate(registry, config(mtp={"depth": 1})).parts.items()}
    assert parts == {
        "embedding": EMBEDDING,
        "head": EMBEDDING,
        "attention": 3 * ATTENTION,
        "dense_ffn": 3 * DENSE,
        "routed_experts": 0,
        "shared_experts": 0,
        "routers": 0,
        "norms": 3 * 2 * 10 + 10,
    }


def test_what_a_module_says_of_its_children_holds_inside_them(registry: Registry) -> None:
    """A stranger's mixture is counted by its own words, down to a part that nobody else has."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.active_share = 0.25
            self.inner = nn.Linear(10, 8, bias=False)

    class Strange(nn.Module):
        parts: ClassVar = {"experts": "routed_experts", "memory": "memory"}

        def __init__(self) -> None:
            super().__init__()
            self.mixture = Mixture(experts=8, top_k=2, shared=0)
            self.experts, self.memory = Experts(), nn.Linear(10, 2, bias=False)
            self.rest = nn.Linear(10, 3, bias=False)

    own = Registry()
    plugin.deepwright_register(own)
    own.add("ffn", "strange", config=DenseConfig)(lambda config, model, layer: Strange())
    cost = estimate(own, config(first_dense_layers=1).model_copy(update={"ffn": {"name": "strange"}}))
    assert cost.parts["routed_experts"] == Part(2 * 80, 2 * 20)
    assert cost.parts["memory"] == Part(2 * 20, 2 * 20)
    assert cost.parts["dense_ffn"] == Part(DENSE + 2 * 30, DENSE + 2 * 30)
    assert (cost.mixture, cost.mixture_layers) == (Mixture(8, 2, 0), 2)
    assert cost.parameters_total - cost.parameters_active == 2 * 60
    assert cost.matmul_active == cost.parameters_active - EMBEDDING - cost.parts["norms"].total


def test_fp8_has_a_scale_for_each_block_and_for_what_is_left_of_one(registry: Registry) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 130, "layers": 1, "intermediate_size": 256}
    attention = {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 128, "qkv_bias": True}
    cost = estimate(registry, ModelConfig(**sizes, attention=attention, ffn={"name": "dense"}))
    # Rows x columns of q, k, v, o, gate, up, down; the biases are no matrices.
    shapes = [(256, 130), (128, 130), (128, 130), (130, 256), (256, 130), (256, 130), (130, 256)]
    assert cost.fp8_weights == sum(rows * columns for rows, columns in shapes)
    assert cost.fp8_blocks == 2 * 2 + 2 + 2 + 2 * 2 + 3 * 2 * 2


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
    assert figures["parameters_total_without_embeddings"] == cost.parameters_total - 2 * EMBEDDING
    assert figures["experts"] is None
    assert figures["memory"]["inference"]["bf16"]["cache"] == 100 * 72 * 2
    assert figures["memory"]["training"]["total"] == 18 * cost.parameters_total
    json.dumps(figures)


def test_the_context_is_one_that_the_model_has(registry: Registry) -> None:
    short = config(max_positions=60)
    assert describe(registry, short)["context"] == 60  # 4096 is more than it has
    assert describe(registry, config(max_positions=5000))["context"] == 4096
    assert [row["tokens"] for row in describe(registry, short)["kv_cache"]["contexts"]] == [60]
    for wrong in (0, -1, 61):
        with pytest.raises(RequestError) as caught:
            describe(registry, short, wrong)
        assert str(caught.value) == (f"context is {wrong}; expected between 1 and model.max_positions, which is 60.")


def test_forward_flops_are_those_that_torch_counts(registry: Registry) -> None:
    model, tokens = build_model(registry, config(), seed=0), torch.randint(50, (2, 8))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    assert counter.get_total_flops() == count(model).forward_flops(16, 8)  # torch counts every pair, masked or not
