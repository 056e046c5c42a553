"""LoRA on a whole DeepSeek-shaped model (MLA, mixture, MTP): what its parts do with a weight that is a sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.finetune.lora import Lora, LoraConfig
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.precision import autocast
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import Plugins, installed
from deepwright_core.registry import parse
from deepwright_core.training.objective import language_model_loss
from deepwright_core.training.trainer import Trainer

VALUES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "layers": 2,
    "intermediate_size": 24,
    "first_dense_layers": 1,
    "max_positions": 64,
    "init_std": 0.2,
    "tied_head": True,
    "mtp": {"depth": 1},
    "attention": {
        "name": "mla",
        "heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
    "ffn": {
        "name": "moe",
        "experts": 4,
        "top_k": 2,
        "intermediate_size": 8,
        "balance_loss": 0.01,
        "router": {"name": "noaux_tc", "bias_update_speed": 0.03},
    },
}
CONFIG = LoraConfig(rank=2, alpha=6.0)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return installed()


def build(plugins: Plugins) -> Transformer:
    return build_model(plugins.registry, parse(ModelConfig, VALUES, "model", plugins.registry), seed=0)


def adapted(plugins: Plugins) -> tuple[Transformer, Lora]:
    """A model whose factors are not zero."""
    model = build(plugins)
    lora = Lora(CONFIG, model, seed=0)
    generator = torch.Generator().manual_seed(3)
    for tensor in lora.factors().values():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.2
    return model, lora


def rows(seed: int = 0) -> Tensor:
    return torch.randint(40, (3, 17), generator=torch.Generator().manual_seed(seed))


def test_attention_and_experts_are_adapted_and_nothing_else(plugins: Plugins) -> None:
    blocks = ["layers.0", "layers.1", "mtp.0.block"]
    want = {f"{block}.attention.{part}.weight" for block in blocks for part in ("q_a", "q_b", "kv_a", "kv_b", "o")}
    want |= {f"{block}.ffn.experts.{part}" for block in blocks[1:] for part in ("gate_up_EID", "down_EDI")}
    model, lora = adapted(plugins)
    assert lora.originals().keys() == want
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(t) for t in lora.factors().values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_sum_written_out(plugins: Plugins, dtype: torch.dtype) -> None:
    """Through grouped products of experts and expanded latents; under autocast too."""
    (model, lora), plain = adapted(plugins), build(plugins)

    class Loss(nn.Module):
        def __init__(self, model: Transformer) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            with autocast(torch.device("cpu"), dtype):
                return language_model_loss(self.model, rows()).total

    factors = lora.factors()
    have = torch.autograd.grad(Loss(model)(), list(factors.values()))
    scale = CONFIG.alpha / CONFIG.rank
    sums = {
        f"model.{path}": weight.detach() + scale * factors[f"{path}.b_NR"] @ factors[f"{path}.a_RK"]
        for path, weight in lora.originals().items()
    }
    want = torch.autograd.grad(functional_call(Loss(plain), sums, ()), list(factors.values()))
    for name, ours, theirs in zip(factors, have, want, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("merged", [False, True])
def test_absorbed_decoding_sees_the_adapters(plugins: Plugins, merged: bool) -> None:
    """It multiplies kv_b's weight itself, past the linear layer."""
    model, lora = adapted(plugins)
    tokens_BS = rows()[:1, :11]
    with torch.no_grad():
        want = model(tokens_BS)
        if merged:
            lora.merge()
        cache = [torch.zeros(20, width) for width in model.cache_widths]
        hidden = []
        for start, end in [(0, 6), (6, 7), (7, 11)]:
            positions_BQ = torch.arange(start, end)[None]
            batch = CacheBatch(positions_BQ, positions_BQ + 4, torch.tensor([[1, 2, 3]]), torch.tensor([end]), 4)
            hidden.append(model.extend(tokens_BS[:, start:end], cache, batch))
        torch.testing.assert_close(torch.cat(hidden, 1), want, rtol=1e-4, atol=1e-5)
        assert (want - build(plugins)(tokens_BS)).abs().max() > 0.1


def test_the_engine_draws_the_same_with_sums_formed_once_as_with_the_merged_model(plugins: Plugins) -> None:
    model, lora = adapted(plugins)
    engine = Engine(model, eos_id=99, cache_tokens=256)
    prompts, params = [[1, 2, 3], [7] * 9], SamplingParams(max_tokens=12, temperature=1.0)

    def draw() -> list[tuple[list[int], list[float]]]:
        engine.update_weights()
        return [(c.token_ids, c.logprobs) for c in engine.generate(prompts, params)]

    with lora.sampling():
        sampled = draw()
    assert draw() == sampled
    lora.merge()
    assert draw() == sampled


def test_routers_stay_as_they_are_while_the_adapters_learn(plugins: Plugins) -> None:
    model = build(plugins)
    lora = Lora(CONFIG, model, seed=0)
    routers = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".router." in name}
    assert any(name.endswith("bias_E") for name in routers)
    built = plugins.registry.build("optimizer", {"name": "muon"}, model, lr=0.02)
    trainer = Trainer(model, built, lambda step: 1.0, clip=1.0, balances=lora.balances)
    first = language_model_loss(model, rows()).total.item()
    for step in range(10):
        metrics = trainer.update(step, [lambda: language_model_loss(model, rows())])
    assert language_model_loss(model, rows()).total.item() < first - 0.1
    assert metrics["expert_max_violation"] > 0  # which would have moved the bias
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in routers.items())
