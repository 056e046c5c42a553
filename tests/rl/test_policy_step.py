"""One reinforcement step on the engine's own samples: the gates of the first mini-batch, and what must not matter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.evaluation import Answered
from deepwright_core.model.transformer import Transformer
from deepwright_core.registry import Registry
from deepwright_core.tasks import Problem
from deepwright_core.training.trainer import Metrics, Trainer
from deepwright_rl.policy_loss import k3
from deepwright_rl.policy_step import reinforce
from deepwright_rl.rollout import Rollouts

PROBLEM = Problem("0" * 64, "sum", "?", "1", {})
END, LONGEST, GROUPS, GROUP_SIZE = 2, 14, 3, 4
COUNT = GROUPS * GROUP_SIZE


def answered(token_ids: list[int]) -> Answered:
    return Answered(PROBLEM, token_ids, None, "", True, False, 0)


def sampled(model: Transformer, temperature: float = 1.0, rewards: Tensor | None = None) -> Rollouts:
    """Groups drawn by the engine, with rewards that nobody earned."""
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 24, (2 + 3 * group,), generator=draw).tolist() for group in range(GROUPS)]
    prompts = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
    params = [SamplingParams(max_tokens=LONGEST, temperature=temperature, seed=n) for n in range(COUNT)]
    completions = Engine(model, END, block_size=4, cache_tokens=400).generate(prompts, params)
    if rewards is None:
        rewards = torch.rand(GROUPS, GROUP_SIZE, generator=draw)
    return Rollouts(
        prompts,
        [answered(completion.token_ids) for completion in completions],
        [completion.logprobs for completion in completions],
        [True] * COUNT,
        rewards,
        {},
    )


def finished(rollouts: Rollouts, *cut: int) -> Rollouts:
    return replace(rollouts, finished=[n not in cut for n in range(COUNT)])


class Learner:
    """A copy of the model that learns by plain gradient descent: what changed is the gradient."""

    def __init__(
        self, registry: Registry, model: Transformer, lr: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.registry, self.start, self.model, self.lr = registry, model, copy.deepcopy(model), lr
        groups = [{"params": list(self.model.parameters()), "peak_lr": lr}]
        self.trainer = Trainer(self.model, torch.optim.SGD(groups, lr=lr), lambda step: 1.0, 1e9, dtype)

    def learn(self, rollouts: Rollouts, algorithm: dict[str, Any] | None = None, **changes: Any) -> Metrics:
        options = {"minibatches": 1, "micro_batch": 100, "temperature": 1.0, "reference": None, **changes}
        return reinforce(
            self.trainer,
            options.pop("reference"),
            self.registry.build("algorithm", algorithm or {"name": "grpo"}),
            rollouts,
            step=0,
            max_tokens=LONGEST,
            pad_id=END,
            **options,
        )

    def gradient(self) -> dict[str, Tensor]:
        """Of the first step, if there was only one."""
        new = dict(self.model.named_parameters())
        return {name: (old - new[name]).detach() / self.lr for name, old in self.start.named_parameters()}


@pytest.fixture
def learner(registry: Registry, model: Transformer) -> Callable[..., Learner]:
    return lambda **options: Learner(registry, model, **options)


def logps(model: Transformer, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """Of each completion token, one sample alone."""
    tokens = torch.tensor([prompt + completion])
    logp_SV = (model.logits(model(tokens[:, :-1]))[0] / temperature).log_softmax(-1)
    return logp_SV[torch.arange(len(prompt) - 1, tokens.shape[1] - 1), tokens[0, len(prompt) :]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gates_of_the_first_mini_batch(
    learner: Callable[..., Learner], model: Transformer, dtype: torch.dtype
) -> None:
    """On its own samples the ratio is 1, the divergence 0, the loss 0 within rounding, and there is a gradient."""
    on_policy = learner(lr=1e-3, dtype=dtype)
    metrics = on_policy.learn(sampled(model), reference=copy.deepcopy(model), micro_batch=5)
    assert metrics["largest_ratio"] == 1.0
    assert metrics["kl"] == 0.0
    assert metrics["clip_fraction"] == 0.0
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["gradient_norm"] > 0.01
    assert metrics["sampler_gap"] < (1e-5 if dtype == torch.float32 else 0.2)
    assert 0 < metrics["entropy"] < torch.tensor(24.0).log()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_the_policy_gradient(
    learner: Callable[..., Learner], model: Transformer, temperature: float
) -> None:
    """At ratio 1: the mean over samples of Â times the mean log-probability of its tokens, scored one by one."""
    rollouts = sampled(model, temperature)
    ours = learner()
    metrics = ours.learn(rollouts, temperature=temperature, micro_batch=5)
    assert metrics["sampler_gap"] < 1e-5
    spread = rollouts.rewards_PG.std(1, keepdim=True)
    advantages = ((rollouts.rewards_PG - rollouts.rewards_PG.mean(1, keepdim=True)) / spread).flatten()
    losses = [
        -advantage * logps(model, prompt, sample.token_ids, temperature).mean() / COUNT
        for advantage, prompt, sample in zip(advantages, rollouts.prompts, rollouts.samples, strict=True)
    ]
    want = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    for (name, have), gradient in zip(ours.gradient().items(), want, strict=True):
        torch.testing.assert_close(have, gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_the_wrong_temperature_shows_in_the_gap(learner: Callable[..., Learner], model: Transformer) -> None:
    assert learner(lr=1e-9).learn(sampled(model, 0.7), temperature=1.0)["sampler_gap"] > 0.1


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_do_not_matter(learner: Callable[..., Learner], model: Transformer, name: str) -> None:
    results = []
    for micro_batch in (1, 5, 100):
        one = learner()
        metrics = one.learn(sampled(model), {"name": name}, micro_batch=micro_batch)
        results.append((one.gradient(), metrics))
    for gradient, metrics in results[1:]:
        for key, tensor in gradient.items():
            torch.testing.assert_close(
                tensor, results[0][0][key], atol=2e-5, rtol=1e-3, msg=lambda m, n=key: f"{n}: {m}"
            )
        for key, figure in metrics.items():
            assert figure == pytest.approx(results[0][1][key], abs=1e-5, rel=1e-4), key


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_what_a_token_weighs(learner: Callable[..., Learner], model: Transformer, name: str) -> None:
    """Mean over samples of means; mean over all tokens; sum over samples and the constant length."""
    rollouts = sampled(model)
    ours = learner()
    ours.learn(rollouts, {"name": name, "advantage": {"name": "group_centred"}})
    advantages = (rollouts.rewards_PG - rollouts.rewards_PG.mean(1, keepdim=True)).flatten()
    tokens = sum(len(sample.token_ids) for sample in rollouts.samples)
    assert len({len(sample.token_ids) for sample in rollouts.samples}) > 1
    losses = []
    for advantage, prompt, sample in zip(advantages, rollouts.prompts, rollouts.samples, strict=True):
        share = {"grpo": 1 / COUNT / len(sample.token_ids), "dapo": 1 / tokens, "dr_grpo": 1 / COUNT / LONGEST}[name]
        losses.append(-advantage * share * logps(model, prompt, sample.token_ids).sum())
    want = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    for (key, have), gradient in zip(ours.gradient().items(), want, strict=True):
        torch.testing.assert_close(have, gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=key: f"{n}: {m}")


def test_cut_off_samples_leave_the_loss_and_stay_in_the_baseline(
    learner: Callable[..., Learner], model: Transformer
) -> None:
    rollouts = finished(sampled(model), 1, 6)
    plain, tokens_changed, reward_changed = learner(), learner(), learner()
    plain.learn(rollouts)

    samples = list(rollouts.samples)
    samples[1] = answered([5] * len(samples[1].token_ids))
    tokens_changed.learn(replace(rollouts, samples=samples))
    for name, gradient in plain.gradient().items():
        torch.testing.assert_close(tokens_changed.gradient()[name], gradient, atol=0, rtol=0)

    rewards = rollouts.rewards_PG.clone()
    rewards[0, 1] += 3
    reward_changed.learn(replace(rollouts, rewards_PG=rewards))
    difference = max((reward_changed.gradient()[name] - g).abs().max() for name, g in plain.gradient().items())
    assert difference > 1e-3

    # By hand: the advantages know the cut-off ones, the mean over samples does not.
    advantages = (rollouts.rewards_PG - rollouts.rewards_PG.mean(1, keepdim=True)) / rollouts.rewards_PG.std(
        1, keepdim=True
    )
    losses = [
        -advantage * logps(model, prompt, sample.token_ids).mean() / (COUNT - 2)
        for n, (advantage, prompt, sample) in enumerate(
            zip(advantages.flatten(), rollouts.prompts, rollouts.samples, strict=True)
        )
        if n not in (1, 6)
    ]
    want = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    for have, gradient in zip(plain.gradient().values(), want, strict=True):
        torch.testing.assert_close(have, gradient, atol=2e-5, rtol=1e-3)


def test_when_all_are_cut_off_nothing_is_learned(learner: Callable[..., Learner], model: Transformer) -> None:
    one = learner()
    metrics = one.learn(finished(sampled(model), *range(COUNT)))
    assert metrics["loss"] == 0.0
    assert all(gradient.abs().max() == 0 for gradient in one.gradient().values())


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_groups_of_equal_rewards_teach_nothing(learner: Callable[..., Learner], model: Transformer, name: str) -> None:
    equal, mixed = learner(), learner()
    equal.learn(sampled(model, rewards=torch.full((GROUPS, GROUP_SIZE), 1.1)), {"name": name})
    assert all(gradient.abs().max() == 0 for gradient in equal.gradient().values())
    rewards = torch.full((GROUPS, GROUP_SIZE), 0.1)
    rewards[1, 2] = 1.1
    mixed.learn(sampled(model, rewards=rewards), {"name": name})
    assert mixed.gradient()["head.weight"].abs().max() > 1e-4


def test_later_mini_batches_are_compared_with_the_policy_that_sampled(
    learner: Callable[..., Learner], model: Transformer
) -> None:
    """All old log-probabilities are from before the first update; every sample is used once."""
    rollouts, one = sampled(model), learner(lr=0.05)
    seen: list[tuple[Tensor, Tensor, int]] = []
    algorithm = one.registry.build("algorithm", {"name": "grpo"})

    def watched(batch: Any) -> Any:
        seen.append((batch.logp_BS[batch.mask_BS].detach(), batch.old_logp_BS[batch.mask_BS], len(batch.mask_BS)))
        return algorithm.policy_loss(batch)

    metrics = reinforce(
        one.trainer,
        None,
        replace(algorithm, policy_loss=watched),
        rollouts,
        step=0,
        minibatches=3,
        micro_batch=2,
        temperature=1.0,
        max_tokens=LONGEST,
        pad_id=END,
    )
    assert [rows for _, _, rows in seen] == [2] * 6
    for now, old, _ in seen[:2]:
        assert torch.equal(now, old)
    assert max((now - old).abs().max() for now, old, _ in seen[2:]) > 1e-3
    with torch.no_grad():
        pairs = zip(rollouts.prompts, rollouts.samples, strict=True)
        sampling = torch.cat([logps(model, prompt, sample.token_ids) for prompt, sample in pairs])
    torch.testing.assert_close(
        torch.cat([old for _, old, _ in seen]).sort().values, sampling.sort().values, atol=1e-5, rtol=0
    )
    assert metrics["largest_ratio"] == pytest.approx(max(float((now - old).abs().max().exp()) for now, old, _ in seen))
    assert metrics["largest_ratio"] > 1.001


def test_the_reference_pulls_back(learner: Callable[..., Learner], model: Transformer, registry: Registry) -> None:
    """KL is the mean of k3 over the completions' tokens, and with no reward its gradient is all there is."""
    torch.manual_seed(0)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rollouts, one = sampled(model, rewards=torch.zeros(GROUPS, GROUP_SIZE)), learner()
    loss = {"name": "clipped", "kl_coefficient": 0.5, "aggregation": "token"}
    metrics = one.learn(rollouts, {"name": "grpo", "policy_loss": loss}, reference=reference, micro_batch=5)
    values = []
    for prompt, sample in zip(rollouts.prompts, rollouts.samples, strict=True):
        with torch.no_grad():
            theirs = logps(reference, prompt, sample.token_ids)
        values.append(k3(logps(model, prompt, sample.token_ids), theirs))
    mean = torch.cat(values).mean()
    assert metrics["kl"] == pytest.approx(mean.item(), rel=1e-3) and metrics["kl"] > 1e-3
    want = torch.autograd.grad(0.5 * mean, list(model.parameters()))
    for have, gradient in zip(one.gradient().values(), want, strict=True):
        torch.testing.assert_close(have, gradient, atol=2e-5, rtol=1e-3)
    fixed = dict(reference.named_parameters())
    assert all(parameter.grad is None for parameter in fixed.values())


def test_learning_makes_rewarded_tokens_likelier(learner: Callable[..., Learner], model: Transformer) -> None:
    """The sign of it all: after a few steps, what was rewarded is more probable, what was not is less."""
    rollouts, one = sampled(model, rewards=torch.tensor([[1.0, 0, 0, 0]]).expand(GROUPS, -1)), learner(lr=0.05)
    for _ in range(5):
        one.learn(rollouts)
    gains = []
    for prompt, sample in zip(rollouts.prompts, rollouts.samples, strict=True):
        with torch.no_grad():
            before, after = (logps(m, prompt, sample.token_ids).mean().item() for m in (model, one.model))
        gains.append(after - before)
    rewarded, others = gains[::GROUP_SIZE], [gain for n, gain in enumerate(gains) if n % GROUP_SIZE]
    assert min(rewarded) > 0 and sum(others) / len(others) < 0
