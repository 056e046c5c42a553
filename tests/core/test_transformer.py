"""The whole model: the residual stream written out, causality, packing, the head, and how weights start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepwright_core.errors import RequestError
from deepwright_core.model.attention import document_starts
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.feed_forward import SwiGLU
from deepwright_core.model.transformer import Transformer, build_model, initialise
from deepwright_core.registry import Registry, parse

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "layers": 2,
    "intermediate_size": 24,
    "max_positions": 32,
    "init_std": 0.2,
    "attention": {"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 4},
    "ffn": {"name": "dense"},
}


def build(registry: Registry, **changes: Any) -> Transformer:
    return build_model(registry, ModelConfig(**{**SIZES, **changes}), seed=3)


def normed(x: Tensor, norm: nn.Module, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def swiglu(x: Tensor, ffn: SwiGLU) -> Tensor:
    gate, up = x @ ffn.gate.weight.T, x @ ffn.up.weight.T
    return (gate * torch.sigmoid(gate) * up) @ ffn.down.weight.T


@torch.no_grad()
def test_the_forward_pass_is_the_residual_stream(registry: Registry) -> None:
    model, tokens_BS = build(registry), torch.randint(50, (2, 9))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)  # norms that do something
    rope = model.rotary(torch.arange(9)[None])
    x_BSD = model.embedding.weight[tokens_BS]
    for block in model.layers:
        x_BSD = x_BSD + block.attention(normed(x_BSD, block.attention_norm), rope, None)
        x_BSD = x_BSD + swiglu(normed(x_BSD, block.ffn_norm), block.ffn)
    want_BSD = normed(x_BSD, model.norm)
    torch.testing.assert_close(model(tokens_BS), want_BSD, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.logits(want_BSD), want_BSD @ model.head.weight.T)


@torch.no_grad()
def test_no_token_sees_a_later_one(registry: Registry) -> None:
    model, tokens_BS = build(registry), torch.randint(50, (1, 10))
    changed = tokens_BS.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    before, after = model(tokens_BS), model(changed)
    assert torch.equal(before[0, :6], after[0, :6])
    assert (before[0, 6:] - after[0, 6:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_a_packed_document_is_what_it_is_alone(registry: Registry) -> None:
    """Rotary positions are relative, so where a document stands in its row makes no difference either."""
    model = build(registry)
    first, second, third = (torch.randint(50, (1, size)) for size in (5, 1, 7))
    segments = torch.tensor([[0] * 5 + [1] + [2] * 7])
    packed = model(torch.cat([first, second, third], 1), segments)
    alone = torch.cat([model(first), model(second), model(third)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_a_document_is_a_run_of_one_number() -> None:
    rows = torch.tensor([[5, 5, 2, 2, 2, 5], [7, 3, 3, -1, -1, -1]])
    assert document_starts(rows).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 3, 3, 3]]


def test_the_first_layers_are_dense_whatever_the_rest_is(registry: Registry) -> None:
    ffn = {"name": "dense", "intermediate_size": 10}
    model = build(registry, layers=3, first_dense_layers=2, ffn=ffn)
    assert [block.ffn.gate.out_features for block in model.layers] == [24, 24, 10]
    assert [block.ffn.gate.out_features for block in build(registry, ffn=ffn).layers] == [10, 10]


def test_more_dense_layers_than_layers_are_refused(registry: Registry) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ModelConfig, {**SIZES, "first_dense_layers": 3}, "model", registry)
    assert caught.value.problems == [
        "model: first_dense_layers is 3 but the model has 2 layers; expected at most that many."
    ]


def test_a_tied_head_is_the_embedding(registry: Registry) -> None:
    model = build(registry, tied_head=True)
    assert model.head.weight is model.embedding.weight
    assert sum(p.numel() for p in build(registry).parameters()) - sum(p.numel() for p in model.parameters()) == 50 * 16
    model.logits(model(torch.randint(50, (1, 4)))).logsumexp(-1).sum().backward()
    absent = model.embedding.weight.grad.abs().sum(1) > 0
    assert absent.all()  # rows that were never looked up have the head's gradient


def test_logits_are_float32_whatever_the_weights_are(registry: Registry) -> None:
    model = build(registry).bfloat16()
    assert model.logits(model(torch.randint(50, (1, 4)))).dtype == torch.float32


def test_cache_widths_are_the_layers(registry: Registry) -> None:
    assert build(registry).cache_widths == [2 * 2 * 4] * 2
    assert build(registry).max_positions == 32


def test_weights_start_normal_with_the_configured_width(registry: Registry) -> None:
    model = build(registry, hidden_size=64, vocab_size=500, init_std=0.006)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            error = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors of a standard deviation
            assert parameter.std().item() == pytest.approx(0.006, rel=error), name
            assert abs(parameter.mean().item()) < 4 * 0.006 / parameter.numel() ** 0.5, name


def test_one_seed_gives_one_model(registry: Registry) -> None:
    torch.manual_seed(1)
    first = build(registry).state_dict()
    torch.manual_seed(2)
    again, other = build(registry).state_dict(), build_model(registry, ModelConfig(**SIZES), seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == name.endswith("norm.weight") for name in first)


def test_a_vector_that_is_no_norm_must_say_how_it_starts() -> None:
    with pytest.raises(ValueError, match="parameter bias is a vector"):
        initialise(nn.Linear(3, 3), 0.1)
