"""Reinforcement of a DeepSeek-shaped model: engine and trainer agree through MLA and mixture, and the routing bias
stays as it was until a batch of rollouts is done with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.evaluation import Answered
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed
from deepwright_core.tasks import Problem
from deepwright_core.training.trainer import Trainer
from deepwright_rl.policy_step import reinforce
from deepwright_rl.rollout import Rollouts

COUNT, END = 12, 2
EXPERTS, TOP_K, SPEED = 8, 3, 0.01


def build() -> Transformer:
    config = ModelConfig(
        vocab_size=24,
        hidden_size=16,
        layers=3,
        intermediate_size=24,
        first_dense_layers=1,
        max_positions=40,
        init_std=0.3,
        attention={
            "name": "mla",
            "heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 4,
        },
        ffn={
            "name": "moe",
            "experts": EXPERTS,
            "top_k": TOP_K,
            "intermediate_size": 8,
            "router": {"name": "noaux_tc", "groups": 4, "top_groups": 2, "bias_update_speed": SPEED},
        },
    )
    return build_model(installed().registry, config, seed=0)


def sampled(model: Transformer) -> Rollouts:
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 24, (2 + n // 4 * 3,), generator=draw).tolist() for n in range(COUNT)]
    params = [SamplingParams(max_tokens=14, seed=n) for n in range(COUNT)]
    completions = Engine(model, END, block_size=4, cache_tokens=400).generate(prompts, params)
    problem = Problem("0" * 64, "sum", "?", "1", {})
    return Rollouts(
        prompts,
        [Answered(problem, completion.token_ids, None, "", True, False, 0) for completion in completions],
        [completion.logprobs for completion in completions],
        [True] * COUNT,
        torch.rand(3, 4, generator=draw),
        {},
    )


def learn(model: Transformer, rollouts: Rollouts, **options: Any) -> dict[str, float]:
    groups = [{"params": list(model.parameters()), "peak_lr": 0.05}]
    trainer = Trainer(model, torch.optim.SGD(groups, lr=0.05), lambda step: 1.0, 1e9)
    algorithm = installed().registry.build("algorithm", {"name": "grpo"})
    sizes = {"minibatches": 3, "micro_batch": 2, **options}
    return reinforce(trainer, None, algorithm, rollouts, step=0, temperature=1.0, max_tokens=14, pad_id=END, **sizes)


def biases(model: Transformer) -> list[Tensor]:
    return [model.layers[layer].ffn.router.bias_E for layer in (1, 2)]


def test_engine_and_trainer_agree() -> None:
    model = build()
    metrics = learn(model, sampled(model), minibatches=1)
    assert metrics["sampler_gap"] < 1e-4
    assert metrics["largest_ratio"] == 1.0


@pytest.mark.parametrize("micro_batch", [2, 100])
def test_the_bias_is_frozen_until_the_last_mini_batch_and_then_moves_once(micro_batch: int) -> None:
    model = build()
    rollouts = sampled(model)
    with torch.no_grad():
        for bias in biases(model):
            bias.copy_(torch.linspace(-0.02, 0.02, EXPERTS))
    start = [bias.clone() for bias in biases(model)]
    seen: list[bool] = []
    loads = [torch.zeros(EXPERTS, dtype=torch.int64) for _ in start]

    def watch(layer: int) -> Any:
        def hook(module: Any, inputs: Any, routing: Any) -> None:
            seen.append(torch.equal(module.bias_E, start[layer]))

        return hook

    for layer in range(2):
        model.layers[layer + 1].ffn.router.register_forward_hook(watch(layer))
    told: list[dict[int, Tensor]] = []
    balance = model.balance
    model.balance = lambda given: (told.append(given), balance(given))  # type: ignore[assignment, method-assign]
    learn(model, rollouts, micro_batch=micro_batch)
    assert all(seen) and len(seen) > 6
    assert len(told) == 1
    tokens = sum(len(p) + len(s.token_ids) - 1 for p, s in zip(rollouts.prompts, rollouts.samples, strict=True))
    for layer, bias in enumerate(biases(model)):
        loads[layer] = told[0][layer + 1]
        assert int(loads[layer].sum()) == tokens * TOP_K  # every real token once, no padding, no scoring pass
        moved = SPEED * torch.sign(loads[layer].float().mean() - loads[layer])
        torch.testing.assert_close(bias, start[layer] + moved)
