"""The stage distill: a smaller dense student learns from the teacher's verified samples (the R1 way).

The teacher answers training problems; what its scorer accepts becomes supervised data. Beside the student, a control
of the same size, start and number of steps learns from the plain SFT mixture: what the student has above it, it has
from the teacher. Both start from random weights, or both from those that `student.init` names. A student that brings
its own tokenizer is taught the teacher's words, not its ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from deepwright_core.chat import encode_many_with_mask
from deepwright_core.data.examples import Example
from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import WorkError
from deepwright_core.evaluation import Answered, EvaluationConfig, Examiner, mark
from deepwright_core.finetune.start import Start, load_start
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import count
from deepwright_core.model.directory import save_model
from deepwright_core.model.fp8 import train_in_fp8
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
STUDENT_START = "student_start"


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
        ("seed", "precision", "kernels", "optimizer", "schedule", "distill"),
        {"problems": "prepare", "rl_model": "rl"},
        partial(run, config),
        partial(check, config),
        start="rl_model",
        given={STUDENT_START: Path(config.student.init)} if config.student.init else {},
    )


def check(config: DistillConfig, sections: Mapping[str, Any]) -> list[str]:
    """Rows must fit the student."""
    return config.student.too_long(config.sequence_length, "distill.sequence_length", "distill.student")


def verified_samples(
    config: DistillConfig,
    teacher: Start,
    problems: list[Problem],
    seed: int,
    context: StageContext,
) -> list[dict[str, Any]]:
    """The teacher's accepted answers, as ids and as text. Kept in a file: a cut-off stage does not sample again."""
    path = context.directory / VERIFIED
    tokenizer = teacher.tokenizer
    if not path.exists():
        engine = Engine(teacher.model, tokenizer.end_ids)
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
                        record = {"prompt": prompt, "completion": sample.token_ids, **_words(sample)}
                        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
                context.progress.advance(start + len(part), f"{len(lines):,} verified")
        write_atomically(path, "".join(lines))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if not records:
        raise WorkError("The teacher solved none of the training problems; train it further before distilling.")
    return records


def _words(sample: Answered) -> dict[str, str]:
    return {"question": sample.problem.question, "thinking": sample.thinking or "", "answer": sample.answer}


def lessons(records: Sequence[Mapping[str, Any]], teacher: Tokenizer, student: Tokenizer) -> list[Example]:
    """Verified samples as training examples: the very tokens that the teacher drew where the student knows them by the
    same ids, otherwise the same words in the student's own chat form."""
    if student.extends(teacher):
        return [
            (r["prompt"] + r["completion"], [False] * len(r["prompt"]) + [True] * len(r["completion"])) for r in records
        ]
    conversations = [
        [
            {"role": "user", "content": r["question"]},
            {"role": "assistant", "content": r["answer"], "reasoning_content": r["thinking"]},
        ]
        for r in records
    ]
    return encode_many_with_mask(student, conversations)


def run(config: DistillConfig, sections: Mapping[str, Any], context: StageContext) -> StageResult:
    """Sample the teacher, train student and control, compare all three."""
    registry, seed = context.registry, sections["seed"]
    teacher_dir, problems_dir = context.inputs["rl_model"], context.inputs["problems"]
    training = load_problems(problems_dir / "train.jsonl")
    teacher = load_start(teacher_dir, registry, pick_device())

    def untaught() -> Start:
        """What student and control start from."""
        if STUDENT_START in context.inputs:
            return load_start(context.inputs[STUDENT_START], registry)
        tokenizer = teacher.tokenizer
        random = config.student.model_copy(update={"vocab_size": tokenizer.vocab_size})
        return Start(build_model(registry, random, seed=seed), tokenizer)

    records = verified_samples(config, teacher, training[: config.problems], seed, context)
    results: dict[str, dict[str, float]] = {}
    with Verifier() as verifier:

        def examiner(part: StageContext, tokenizer: Tokenizer) -> Examiner:
            return Examiner(
                "distill", tokenizer, problems_dir, verifier.score, config.evaluation, seed, config.steps, part
            )

        context.progress.start("teacher's examination", 1)
        examined = replace(context, directory=context.directory / "teacher")
        results["teacher"] = examiner(examined, teacher.tokenizer)(teacher.model, config.steps)
        context.progress.advance(1)
        for role in ("control", "student"):
            part = replace(context, directory=context.directory / role, tracker=Labelled(context.tracker, role))
            learner = untaught()
            model, tokenizer = learner.model, learner.tokenizer
            if sections["precision"] == "fp8":
                train_in_fp8(model)
            if role == "student":
                examples = lessons(records, teacher.tokenizer, tokenizer)
            else:
                examples = solutions(tokenizer, training, config.control_worked_share, seed)
            memory = fine_tune(
                f"distill {role}",
                model,
                examples,
                config,
                sections,
                part,
                tokenizer.filler_id,
                partial(examiner(part, tokenizer), model),
            )
            results[role] = {k: v for k, v in memory["evaluations"][-1].items() if k != "step"}
            if role == "student":
                save_model(model, context.directory / "model")
                tokenizer.save(context.directory / "model")
    teacher_cost, student_cost = count(teacher.model), count(model)
    accuracy = {role: figures["test_pass_at_1"] for role, figures in results.items()}
    metrics = {f"{role}_{name}": value for role, figures in results.items() for name, value in figures.items()}
    metrics |= {
        "verified_samples": float(len(records)),
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
            *learner.notes,
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
