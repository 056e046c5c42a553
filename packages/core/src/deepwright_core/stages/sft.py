"""The stage sft: supervised fine-tuning on chat-templated solutions, the cold start for reinforcement.

The loss is on the assistant's tokens alone. `worked_share` of the examples show their work in <think>, the others
answer at once, as most of what people write does: the model can then think, and mostly does not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from ..chat import encode_many_with_mask
from ..data.examples import Example, PackedExamples
from ..data.mixture import conversation
from ..evaluation import EvaluationConfig, Examiner, gain_note
from ..finetune.full import Full
from ..finetune.method import FineTuning
from ..finetune.start import load_start
from ..model.cost import count
from ..model.directory import save_model
from ..model.fp8 import train_in_fp8
from ..model.precision import resolve
from ..model.transformer import Transformer
from ..registry import Registry
from ..stage import Stage, StageContext, StageResult
from ..tasks import Problem, load_problems
from ..tasks.verifier import Verifier
from ..tokenizer import Tokenizer
from ..training.machine import pick_device
from ..training.objective import Loss, language_model_loss
from ..training.trainer import Metrics, Trainer, TrainingConfig, train


class SupervisedConfig(TrainingConfig):
    """Supervised training on packed examples: batch_size rows of sequence_length tokens a step."""

    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    sequence_length: int = Field(256, ge=2)


class SFTConfig(SupervisedConfig):
    """examples: how many training problems to use (0: all). worked_share: of them, what part shows its work."""

    steps: int = Field(300, ge=1)
    examples: int = Field(0, ge=0)
    worked_share: float = Field(0.3, ge=0, le=1)
    evaluate_every: int = Field(100, ge=0)
    evaluation: EvaluationConfig = EvaluationConfig()


def register(registry: Registry) -> None:
    registry.add("stage", "sft", config=SFTConfig)(build)


def build(config: SFTConfig) -> Stage:
    """Base model to one that answers in chat form."""
    return Stage(
        "sft",
        ("seed", "precision", "kernels", "optimizer", "schedule", "finetune", "sft"),
        {"problems": "prepare", "base_model": "pretrain"},
        partial(run, config),
        partial(check, config),
        start="base_model",
    )


def check(config: SFTConfig, sections: Mapping[str, Any]) -> list[str]:
    """Rows must fit the model, when the config has one."""
    model = sections.get("model")
    return [] if model is None else model.too_long(config.sequence_length, "sft.sequence_length")


def solutions(tokenizer: Tokenizer, problems: Sequence[Problem], worked_share: float, seed: int) -> list[Example]:
    """Training examples: each problem with its worked solution or with its bare answer."""
    dice = random.Random(f"solutions {seed}")
    return encode_many_with_mask(
        tokenizer,
        [conversation(problem, bool(problem.worked) and dice.random() < worked_share) for problem in problems],
    )


def fine_tune(
    stage: str,
    model: Transformer,
    examples: Sequence[Example],
    config: SupervisedConfig,
    sections: Mapping[str, Any],
    context: StageContext,
    pad_id: int,
    evaluate: Any,
    tuning: FineTuning | None = None,
) -> dict[str, Any]:
    """Train a model on examples through the one loop; returns its memory. tuning: what was made of the model before
    (default: all of it trains)."""
    device = pick_device()
    trainer = Trainer(
        model.to(device),
        context.registry.build("optimizer", sections["optimizer"], model, lr=config.lr),
        context.registry.build("schedule", sections["schedule"], config.steps),
        config.clip,
        resolve(sections["precision"], device),
        balances=(tuning or Full()).balances,
    )
    data = PackedExamples(examples, config.batch_size, config.sequence_length, pad_id, sections["seed"])

    def step(number: int) -> Metrics:
        batch = data.batch(number)
        figures: Metrics = {}

        def loss() -> Loss:
            loss = language_model_loss(
                model,
                batch.tokens_BS1.to(device),
                batch.segments_BS1.to(device),
                batch.trained_BS1.to(device),
                batch.real_BS1.to(device),
            )
            figures["loss"] = float(loss.next_token)
            return loss

        return figures | trainer.update(number, [loss])

    memory: dict[str, Any] = {}
    train(stage, trainer, config, context, step, memory, evaluate)
    return memory


def run(config: SFTConfig, sections: Mapping[str, Any], context: StageContext) -> StageResult:
    """Fine-tune the base model on worked and bare solutions."""
    start = load_start(context.inputs["base_model"], context.registry, pick_device())
    model, tokenizer = start.model, start.tokenizer
    if sections["precision"] == "fp8":
        train_in_fp8(model)
    problems = context.inputs["problems"]
    cost = count(model)
    tuning: FineTuning = context.registry.build(
        "finetune", sections["finetune"], model, sections["seed"], start.new_rows
    )
    chosen = load_problems(problems / "train.jsonl")[: config.examples or None]
    examples = solutions(tokenizer, chosen, config.worked_share, sections["seed"])
    with Verifier() as verifier:
        examiner = Examiner(
            "sft", tokenizer, problems, verifier.score, config.evaluation, sections["seed"], config.steps, context
        )

        def evaluate(number: int) -> Metrics:
            with tuning.sampling():
                return examiner(model, number)

        memory = fine_tune("sft", model, examples, config, sections, context, tokenizer.filler_id, evaluate, tuning)
    beside = tuning.finish(context.directory)
    save_model(model, context.directory / "model")
    tokenizer.save(context.directory / "model")
    tokens = config.steps * config.batch_size * config.sequence_length
    first, last = memory["evaluations"][0], memory["evaluations"][-1]
    return StageResult(
        {"sft_model": "model", "samples": "samples", **beside},
        {key: value for key, value in last.items() if key != "step"} | memory["balance"] | dict(tuning.metrics),
        ("test accuracy, sampled", first["test_pass_at_1"], last["test_pass_at_1"]),
        tokens,
        cost.training_flops(tokens, config.sequence_length),
        (gain_note(first, last), *start.notes, *tuning.notes),
    )
