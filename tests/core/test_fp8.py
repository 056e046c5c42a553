"""Training in FP8: what is converted and what is not, what it computes, and which models it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepwright_core.errors import RequestError
from deepwright_core.finetune.lora import Lora, LoraConfig
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.fp8 import Fp8Linear, Fp8SwiGLU, fp8_problems, train_in_fp8
from deepwright_core.model.precision import autocast, resolve
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_core.training.objective import language_model_loss

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "layers": 2,
    "intermediate_size": 96,
    "max_positions": 64,
    "init_std": 0.1,
    "attention": {"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 16, "qkv_bias": True},
    "ffn": {"name": "dense"},
    "mtp": {"depth": 1},
}


def build(registry: Registry, **changes: Any) -> Transformer:
    return build_model(registry, ModelConfig(**{**SIZES, **changes}), seed=3)


def gradients(model: Transformer, tokens_BS1: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with autocast(CPU, torch.bfloat16):
        loss = language_model_loss(model, tokens_BS1)
    loss.total.backward()
    return float(loss.total.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_projections_of_blocks_are_converted_and_nothing_else(registry: Registry) -> None:
    model = build(registry)
    train_in_fp8(model)
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    converted = {name for name, kind in kinds.items() if kind is Fp8Linear}
    assert kinds.keys() - converted == {"head", "mtp.0.projection"}
    assert "layers.0.attention.q" in converted and "mtp.0.block.attention.o" in converted
    assert all(type(block.ffn) is Fp8SwiGLU for block in [*model.layers, model.mtp[0].block])


def test_parameters_and_checkpoints_do_not_know_of_it(registry: Registry) -> None:
    plain, model = build(registry), build(registry)
    before = dict(model.named_parameters())
    train_in_fp8(model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())


def test_it_is_the_plain_model_in_evaluation_and_close_to_it_in_training(registry: Registry) -> None:
    tokens_BS1 = torch.randint(48, (2, 33), generator=torch.Generator().manual_seed(0))
    plain, model = build(registry), build(registry)
    train_in_fp8(model)
    assert torch.equal(plain.eval()(tokens_BS1), model.eval()(tokens_BS1))
    want_loss, want = gradients(plain.train(), tokens_BS1)
    have_loss, have = gradients(model.train(), tokens_BS1)
    assert have.keys() == want.keys()
    assert have_loss != want_loss and have_loss == pytest.approx(want_loss, rel=0.01)
    for name in ("layers.0.ffn.down.weight", "mtp.0.block.attention.o.weight"):
        assert (have[name] - want[name]).norm() / want[name].norm() < 0.15, name


def test_adapters_train_on_a_converted_model(registry: Registry) -> None:
    model = build(registry)
    train_in_fp8(model)
    Lora(LoraConfig(rank=2, targets=["attention", "ffn"]), model, seed=0)
    _, have = gradients(model.train(), torch.randint(48, (2, 17)))
    assert have and all(torch.isfinite(gradient).all() for gradient in have.values())
    assert any("a_RK" in name for name in have)


def test_sizes_that_fp8_cannot_take_are_refused_with_the_layers_named(registry: Registry) -> None:
    model = build(registry, intermediate_size=100)
    problems = fp8_problems(model, CPU, "distill.student")
    assert problems[0].startswith(
        "precision is fp8, but the layer 'gate' of distill.student has the sizes 64 -> 100; expected multiples of 16."
    )
    before = [type(module) for module in model.modules()]
    with pytest.raises(RequestError, match="'down' of model has the sizes 100 -> 64"):
        train_in_fp8(model)
    assert [type(module) for module in model.modules()] == before


def test_a_gpu_without_fp8_products_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An older card")
    (problem,) = fp8_problems(build(registry), torch.device("cuda"))
    assert problem.startswith("precision is fp8, but An older card has no FP8 products")


def test_what_is_not_in_fp8_runs_in_bf16() -> None:
    assert resolve("fp8", CPU) is torch.bfloat16
