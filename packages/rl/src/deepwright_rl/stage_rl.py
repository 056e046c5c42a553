"""The stage rl: group relative policy optimisation on the engine's own samples.

Each step draws a group of answers to each of a few training problems, rewards them, and learns. The loss of GRPO is
about 0 on its own samples and may rise: look at the reward and the held-out accuracy, not at the loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from deepwright_core.engine import Engine
from deepwright_core.evaluation import EvaluationConfig, Examiner, gain_note
from deepwright_core.events import RolloutEvent
from deepwright_core.finetune.method import FineTuning
from deepwright_core.finetune.start import load_start
from deepwright_core.model.cost import count
from deepwright_core.model.directory import save_model
from deepwright_core.model.precision import autocast, resolve
from deepwright_core.registry import ComponentOf, Registry
from deepwright_core.stage import Stage, StageContext, StageResult, write_atomically
from deepwright_core.tasks import Problem, load_problems
from deepwright_core.tasks.verifier import Verifier
from deepwright_core.training.machine import pick_device
from deepwright_core.training.schedule import ConstantConfig, build_constant
from deepwright_core.training.trainer import Metrics, Trainer, TrainingConfig, train

from .algorithm import Algorithm
from .policy_step import reinforce
from .reward import build_rewards
from .rollout import Rollouts, roll_out

# Seeds of two steps never meet: no batch of rollouts has this many samples.
SEEDS_PER_STEP = 1_000_003


class RLConfig(TrainingConfig):
    """problems_per_step problems with group_size samples each make a rollout batch, learned from in `minibatches`
    optimizer steps, `micro_batch` samples at a time.

    lr: constant after warmup_steps. max_tokens: longest answer while training.
    shuffle_rewards: a control in which rewards are shuffled inside each group, so that nothing can be learned.
    """

    steps: int = Field(60, ge=1)
    lr: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(5, ge=0)
    problems_per_step: int = Field(24, ge=1)
    group_size: int = Field(8, ge=1)
    minibatches: int = Field(2, ge=1)
    micro_batch: int = Field(96, ge=1)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(64, ge=1)
    algorithm: Annotated[dict[str, Any], ComponentOf("algorithm")] = {"name": "grpo"}
    rewards: Annotated[dict[str, Any], ComponentOf("reward", many=True)] = {
        "correctness": {"name": "correctness"},
        "format": {"name": "format"},
    }
    shuffle_rewards: bool = False
    save_every: int = Field(20, ge=0)
    evaluate_every: int = Field(20, ge=0)
    evaluation: EvaluationConfig = EvaluationConfig()


def register(registry: Registry) -> None:
    registry.add("stage", "rl", config=RLConfig)(build)


def build(config: RLConfig) -> Stage:
    """Reinforcement learning on verifiable rewards."""
    return Stage(
        "rl",
        ("seed", "precision", "kernels", "optimizer", "finetune", "rl"),
        {"problems": "prepare", "sft_model": "sft"},
        partial(run, config),
        partial(check, config),
        start="sft_model",
    )


def check(config: RLConfig, sections: Mapping[str, Any]) -> list[str]:
    """What cannot be seen in one value alone."""
    samples = config.problems_per_step * config.group_size
    if config.minibatches > samples:
        return [f"rl.minibatches is {config.minibatches}; expected at most the {samples} samples of a step."]
    if not config.rewards:
        return ["rl.rewards is empty; expected at least one reward, such as rl.rewards.correctness.name=correctness."]
    return []


class ProblemOrder:
    """Which problems a step sees: a seeded permutation a pass, and nothing but the step's number decides."""

    def __init__(self, problems: list[Problem], per_step: int, seed: int) -> None:
        self.problems, self.per_step, self.seed = problems, per_step, seed

    def at(self, step: int) -> list[Problem]:
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [self.problems[self._permutation(p // len(self.problems))[p % len(self.problems)]] for p in places]

    def _permutation(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.problems)).tolist()


def shuffle_in_groups(rollouts: Rollouts, seed: int) -> None:
    """The control: every group keeps its rewards but not which sample earned which."""
    generator = torch.Generator().manual_seed(seed)
    for group_G in rollouts.rewards_PG:
        group_G.copy_(group_G[torch.randperm(len(group_G), generator=generator)])


def rollout_metrics(rollouts: Rollouts) -> Metrics:
    """What a batch of samples looks like."""
    samples = rollouts.samples
    spread_P = rollouts.rewards_PG.amax(1) - rollouts.rewards_PG.amin(1)
    return {
        "reward": float(rollouts.rewards_PG.mean()),
        **{f"reward_{label}": value for label, value in rollouts.parts.items()},
        "accuracy": float(np.mean([sample.correct for sample in samples])),
        "response_tokens": float(np.mean([len(sample.token_ids) for sample in samples])),
        "thinking_tokens": float(np.mean([sample.thinking_tokens for sample in samples])),
        "thinking_share": float(np.mean([sample.thinking is not None for sample in samples])),
        "truncated_share": 1 - float(np.mean(rollouts.finished)),
        "zero_advantage_groups": float((spread_P == 0).float().mean()),
    }


def run(config: RLConfig, sections: Mapping[str, Any], context: StageContext) -> StageResult:
    """Sample, reward, learn; the model that it starts from is also the reference."""
    registry, seed = context.registry, sections["seed"]
    device = pick_device()
    start = load_start(context.inputs["sft_model"], registry, device)
    model, tokenizer = start.model, start.tokenizer
    cost = count(model)
    tuning: FineTuning = registry.build("finetune", sections["finetune"], model, seed, start.new_rows)
    algorithm: Algorithm = registry.build("algorithm", config.algorithm)
    needs_reference = algorithm.needs_reference
    reference = load_start(context.inputs["sft_model"], registry, device).model if needs_reference else None
    trainer = Trainer(
        model,
        registry.build("optimizer", sections["optimizer"], model, lr=config.lr),
        build_constant(ConstantConfig(warmup_steps=config.warmup_steps), config.steps),
        config.clip,
        resolve(sections["precision"], device),
        balances=tuning.balances,
    )
    rewards = build_rewards(registry, config.rewards)
    problems = ProblemOrder(load_problems(context.inputs["problems"] / "train.jsonl"), config.problems_per_step, seed)
    engine = Engine(model, tokenizer.end_ids)
    memory: dict[str, Any] = {"tokens": 0, "flops": 0.0}

    with Verifier() as verifier:
        examiner = Examiner(
            "rl", tokenizer, context.inputs["problems"], verifier.score, config.evaluation, seed, config.steps, context
        )

        def step(number: int) -> Metrics:
            model.eval()
            engine.update_weights()
            # What samples and what learns must be the same policy.
            with tuning.sampling(), autocast(device, trainer.dtype):
                rollouts = roll_out(
                    engine,
                    tokenizer,
                    problems.at(number),
                    verifier.score,
                    rewards,
                    group_size=config.group_size,
                    temperature=config.temperature,
                    max_tokens=config.max_tokens,
                    seed=(seed * config.steps + number) * SEEDS_PER_STEP,
                )
            transcripts: list[Mapping[str, Any]] = [
                sample.transcript() | {"reward": reward}
                for sample, reward in zip(rollouts.samples, rollouts.rewards_PG.flatten().tolist(), strict=True)
            ]
            context.hook.deepwright_rollout_done(event=RolloutEvent("rl", number + 1, transcripts))
            if config.shuffle_rewards:
                shuffle_in_groups(rollouts, number)
            figures = rollout_metrics(rollouts)
            figures |= reinforce(
                trainer,
                reference,
                algorithm,
                rollouts,
                step=number,
                minibatches=config.minibatches,
                micro_batch=config.micro_batch,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                pad_id=tokenizer.filler_id,
            )
            figures["verifier_failures"] = float(verifier.failures)
            tokens = sum(len(sample.token_ids) for sample in rollouts.samples)
            context_length = float(np.mean([len(prompt) for prompt in rollouts.prompts]))
            passes = 1 + 3 + 1 + (reference is not None)  # sample, train, score as old policy, score as reference
            memory["tokens"] += tokens
            memory["flops"] += passes * cost.forward_flops(tokens, context_length)
            if number + 1 == config.steps:
                lines = "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in transcripts)
                write_atomically(context.directory / "samples" / "last-rollouts.jsonl", lines)
            return figures

        def evaluate(number: int) -> Metrics:
            with tuning.sampling():
                return examiner(model, number)

        train(
            "rl",
            trainer,
            config,
            context,
            step,
            memory,
            evaluate,
            lambda m: f"reward {m['reward']:.2f} · accuracy {m['accuracy']:.2f} · thinking {m['thinking_share']:.2f}",
        )
    beside = tuning.finish(context.directory)
    save_model(model, context.directory / "model")
    tokenizer.save(context.directory / "model")
    before, after = memory["evaluations"][0], memory["evaluations"][-1]
    metrics = {f"before_{name}": value for name, value in before.items() if name != "step"}
    metrics |= {name: value for name, value in after.items() if name != "step"}
    return StageResult(
        {"rl_model": "model", "samples": "samples", **beside},
        metrics | memory["balance"] | dict(tuning.metrics),
        ("test accuracy, sampled", before["test_pass_at_1"], after["test_pass_at_1"]),
        memory["tokens"],
        memory["flops"],
        (gain_note(before, after), *start.notes, *tuning.notes),
    )
