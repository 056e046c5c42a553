"""The stage distill: a smaller dense student learns from the teacher's verified samples (the R1 way).

The teacher answers training problems; what its scorer accepts becomes supervised data. Beside the student, a control
of the same size, start and number of steps learns from the plain SFT mixture: what the student has above it, it has
from the teacher. Both start from random weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from deepwright_core.data.examples import Example
from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import WorkError
from deepwright_core.evaluation import EvaluationConfig, Examiner, mark
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import count
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import Registry
from deepwright_core.stage import Stage, StageContext, StageResult, write_atomically
from deepwright_core.stages.sft import SupervisedConfig, fine_tune, solutions
from deepwright_core.tasks import Problem, load_problems
from deepwright_core.tasks.verifier import Verifier
from deepwright_core.tokenizer import Tokenizer
from deepwright_core.tracking import Tracker
from deepwright_core.training.machine import pick_device

VERIFIED = "verified.jsonl"
# Problems answered at once: the engine's own batch, a few times over.
PROBLEMS_AT_ONCE = 1024


class DistillConfig(SupervisedConfig):
    """student: the model that learns. problems: how many training problems the teacher answers, `samples` times each.

    control_worked_share: the SFT mixture that the control learns from; keep it at the value of sft.worked_share.
    """

    steps: int = Field(400, ge=1)
    lr: float = Field(6e-3, gt=0)
    student: ModelConfig
    problems: int = Field(8192, ge=1)
    samples: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(64, ge=1)
    control_worked_share: float = Field(0.3, ge=0, le=1)
    evaluation: EvaluationConfig = EvaluationConfig()


def register(registry: Registry) -> None:
    registry.add("stage", "distill", config=DistillConfig)(build)


def build(config: DistillConfig) -> Stage:
    """Teach a smaller dense student from the teacher's verified samples."""
    return Stage(
        "distill",
        ("seed", "precision", "optimizer", "schedule", "distill"),
        {"problems": "prepare", "rl_model": "rl"},
        partial(run, config),
        partial(check, config),
    )


def check(config: DistillConfig, sections: Mapping[str, Any]) -> list[str]:
    """Rows must fit the student."""
    return config.student.too_long(config.sequence_length, "distill.sequence_length", "distill.student")


def verified_samples(
    config: DistillConfig,
    teacher: Path,
    tokenizer: Tokenizer,
    problems: list[Problem],
    seed: int,
    context: StageContext,
) -> list[Example]:
    """The teacher's accepted answers as training examples. Kept in a file: a cut-off stage does not sample again."""
    path = context.directory / VERIFIED
    if not path.exists():
        model = load_model(teacher, context.registry, pick_device())
        engine = Engine(model, tokenizer.eos_id)
        repeated = [problem for problem in problems for _ in range(config.samples)]
        context.progress.start("teacher's samples", len(repeated))
        lines: list[str] = []
        with Verifier() as verifier:
            for start in range(0, len(repeated), PROBLEMS_AT_ONCE):
                part = repeated[start : start + PROBLEMS_AT_ONCE]
                prompts = [tokenizer.chat([{"role": "user", "content": problem.question}]) for problem in part]
                params = [
                    SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=seed + start + n)
                    for n in range(len(part))
                ]
                for prompt, sample in zip(
                    prompts, mark(tokenizer, part, engine.generate(prompts, params), verifier.score), strict=True
                ):
                    if sample.correct and sample.well_formed:
                        lines.append(json.dumps({"prompt": prompt, "completion": sample.token_ids}) + "\n")
                context.progress.advance(start + len(part), f"{len(lines):,} verified")
        write_atomically(path, "".join(lines))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if not records:
        raise WorkError("The teacher solved none of the training problems; train it further before distilling.")
    return [
        (r["prompt"] + r["completion"], [False] * len(r["prompt"]) + [True] * len(r["completion"])) for r in records
    ]


def run(config: DistillConfig, sections: Mapping[str, Any], context: StageContext) -> StageResult:
    """Sample the teacher, train student and control, compare all three."""
    registry, seed = context.registry, sections["seed"]
    teacher_dir, problems_dir = context.inputs["rl_model"], context.inputs["problems"]
    tokenizer = Tokenizer.load(teacher_dir)
    training = load_problems(problems_dir / "train.jsonl")
    taught = verified_samples(config, teacher_dir, tokenizer, training[: config.problems], seed, context)
    plain = solutions(tokenizer, training, config.control_worked_share, seed)
    student_config = config.student.model_copy(update={"vocab_size": tokenizer.vocab_size})
    results: dict[str, dict[str, float]] = {}
    with Verifier() as verifier:

        def examiner(part: StageContext) -> Examiner:
            return Examiner(
                "distill", tokenizer, problems_dir, verifier.score, config.evaluation, seed, config.steps, part
            )

        teacher = load_model(teacher_dir, registry, pick_device())
        context.progress.start("teacher's examination", 1)
        results["teacher"] = examiner(replace(context, directory=context.directory / "teacher"))(teacher, config.steps)
        context.progress.advance(1)
        for role, examples in (("control", plain), ("student", taught)):
            part = replace(context, directory=context.directory / role, tracker=Labelled(context.tracker, role))
            model = build_model(registry, student_config, seed=seed)
            memory = fine_tune(
                f"distill {role}",
                model,
                examples,
                config,
                sections,
                part,
                tokenizer.pad_id,
                partial(examiner(part), model),
            )
            results[role] = {k: v for k, v in memory["evaluations"][-1].items() if k != "step"}
            if role == "student":
                save_model(model, context.directory / "model")
                tokenizer.save(context.directory / "model")
    teacher_cost, student_cost = count(teacher), count(model)
    accuracy = {role: figures["test_pass_at_1"] for role, figures in results.items()}
    metrics = {f"{role}_{name}": value for role, figures in results.items() for name, value in figures.items()}
    metrics |= {
        "verified_samples": float(len(taught)),
        "teacher_parameters_active": float(teacher_cost.parameters_active),
        "student_parameters_active": float(student_cost.parameters_active),
        "active_parameters_ratio": student_cost.parameters_active / teacher_cost.parameters_active,
        "kept_accuracy": accuracy["student"] / max(accuracy["teacher"], 1e-9),
        "gain_over_control": accuracy["student"] - accuracy["control"],
    }
    tokens = 2 * config.steps * config.batch_size * config.sequence_length
    return StageResult(
        {"student_model": "model", "verified": VERIFIED},
        metrics,
        ("test accuracy, SFT alone → distilled", accuracy["control"], accuracy["student"]),
        tokens,
        student_cost.training_flops(tokens, config.sequence_length),
        (
            f"With {metrics['active_parameters_ratio']:.0%} of the teacher's active parameters the student keeps "
            f"{metrics['kept_accuracy']:.0%} of its accuracy ({accuracy['teacher']:.3f} → {accuracy['student']:.3f}); "
            f"the same student from SFT alone has {accuracy['control']:.3f}.",
        ),
    )


class Labelled:
    """A tracker whose metrics carry a label, for the parts of one stage."""

    def __init__(self, tracker: Tracker, label: str) -> None:
        self._tracker, self._label = tracker, label

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.metrics({f"{self._label}_{name}": value for name, value in values.items()}, step)

    def parameters(self, values: Mapping[str, Any]) -> None:
        self._tracker.parameters({f"{self._label}_{name}": value for name, value in values.items()})

    def artifact(self, path: Path, folder: str = "") -> None:
        self._tracker.artifact(path, folder)
