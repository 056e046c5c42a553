"""How well a model solves problems that it has not seen: exact match, greedy and sampled.

Every problem is answered once greedily and `samples` times at a temperature. pass@1 is the mean over the samples,
pass@k the share of problems that any of the samples solves. Intervals are bootstrapped over problems, because the
samples of one problem are not independent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from .chat import parse_reply
from .engine import Completion, Engine, SamplingParams
from .model.transformer import Transformer
from .stage import StageContext, write_atomically
from .tasks import Problem, load_problems
from .tokenizer import Tokenizer

Scorer = Callable[[Sequence[tuple[Problem, str]]], list[float]]
CORRECT = 1.0


class EvaluationConfig(BaseModel):
    """problems: how many test problems (0: all). samples: draws of each beside the greedy one.

    validation_problems: how many validation problems to look at in the course of training, with one draw of each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    problems: int = Field(256, ge=0)
    validation_problems: int = Field(64, ge=1)
    samples: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(96, ge=1)


@dataclass(frozen=True)
class Answered:
    """One completion, taken apart and scored. `thinking_tokens` is 0 when the model did not think."""

    problem: Problem
    token_ids: list[int]
    thinking: str | None
    answer: str
    well_formed: bool
    correct: bool
    thinking_tokens: int

    def transcript(self) -> dict[str, Any]:
        """The completion as people read it."""
        return {
            "problem": self.problem.id,
            "question": self.problem.question,
            "expected": self.problem.answer,
            "thinking": self.thinking,
            "answer": self.answer,
            "correct": self.correct,
            "well_formed": self.well_formed,
            "tokens": len(self.token_ids),
        }


@dataclass(frozen=True)
class Assessment:
    """Figures and transcripts of an evaluation; `tokens` were generated for it."""

    metrics: dict[str, float]
    transcripts: list[dict[str, Any]]
    tokens: int


def mark(
    tokenizer: Tokenizer, problems: Sequence[Problem], completions: Sequence[Completion], score: Scorer
) -> list[Answered]:
    """Take completions apart and score their answers."""
    replies = [parse_reply(tokenizer, completion.token_ids) for completion in completions]
    scores = score([(problem, reply.answer) for problem, reply in zip(problems, replies, strict=True)])
    return [
        Answered(
            problem,
            list(completion.token_ids),
            reply.thinking,
            reply.answer,
            reply.well_formed,
            value >= CORRECT,
            0 if reply.thinking is None else _thinking_tokens(tokenizer, completion.token_ids),
        )
        for problem, completion, reply, value in zip(problems, completions, replies, scores, strict=True)
    ]


def _thinking_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    ids = list(ids)
    end = ids.index(tokenizer.think_end_id) if tokenizer.think_end_id in ids else len(ids)
    return sum(i != tokenizer.think_start_id for i in ids[:end])


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean, by resampling the values (one a problem)."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.percentile(array[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def assess(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    score: Scorer,
    config: EvaluationConfig,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Assessment:
    """Answer and score problems. Seeds depend on the problem's place alone, so that two models are compared on equal
    draws."""
    problems = list(problems[: config.problems or None])
    prompts = [tokenizer.chat([{"role": "user", "content": p.question}]) for p in problems]
    greedy = SamplingParams(max_tokens=config.max_tokens, temperature=0.0)
    drawn = [
        SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=seed * 1_000_003 + n)
        for n in range(len(problems) * config.samples)
    ]
    repeated = [n for n in range(len(problems)) for _ in range(config.samples)]
    completions = engine.generate(
        prompts + [prompts[n] for n in repeated], [greedy] * len(problems) + drawn, on_progress=on_progress
    )
    answered = mark(tokenizer, problems + [problems[n] for n in repeated], completions, score)
    first, rest = answered[: len(problems)], answered[len(problems) :]
    correct_PK = np.array([a.correct for a in rest]).reshape(len(problems), config.samples)
    greedy_P = [float(a.correct) for a in first]
    low, high = bootstrap_interval(correct_PK.mean(1).tolist())
    greedy_low, greedy_high = bootstrap_interval(greedy_P)
    metrics = {
        "greedy_accuracy": float(np.mean(greedy_P)),
        "greedy_accuracy_low": greedy_low,
        "greedy_accuracy_high": greedy_high,
        "pass_at_1": float(correct_PK.mean()),
        "pass_at_1_low": low,
        "pass_at_1_high": high,
        f"pass_at_{config.samples}": float(correct_PK.any(1).mean()),
        "thinking_share": float(np.mean([a.thinking is not None for a in rest])),
        "thinking_tokens": float(np.mean([a.thinking_tokens for a in rest])),
        "response_tokens": float(np.mean([len(a.token_ids) for a in rest])),
        "well_formed_share": float(np.mean([a.well_formed for a in rest])),
    }
    tokens = sum(len(a.token_ids) for a in answered)
    return Assessment(metrics, [a.transcript() for a in first], tokens)


def gain_note(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What changed between two examinations on the test problems, in a sentence."""
    shown = {"greedy": "test_greedy_accuracy"}
    shown |= {name.replace("test_pass_at_", "pass@"): name for name in after if re.fullmatch(r"test_pass_at_\d+", name)}
    shown |= {"share of answers with thinking": "test_thinking_share"}
    figures = ", ".join(f"{label} {before[name]:.3f} → {after[name]:.3f}" for label, name in shown.items())
    tokens = "test_thinking_tokens"
    return f"Held-out problems: {figures}; thinking {before[tokens]:.1f} → {after[tokens]:.1f} tokens."


class Examiner:
    """Examines a model in the course of a stage: the test problems before the first and after the last step, fewer
    validation problems in between, so that nothing is ever chosen by looking at the test.

    Leaves the transcripts of each examination in `samples/` of the stage's directory.
    """

    def __init__(
        self,
        stage: str,
        tokenizer: Tokenizer,
        problems: Path,
        score: Scorer,
        config: EvaluationConfig,
        seed: int,
        last_step: int,
        context: StageContext,
    ) -> None:
        self.stage, self.tokenizer, self.score, self.config, self.seed = stage, tokenizer, score, config, seed
        self.last_step, self.context = last_step, context
        self.test = load_problems(problems / "test.jsonl")
        self.validation = load_problems(problems / "validation.jsonl")

    def __call__(self, model: Transformer, step: int) -> dict[str, float]:
        """Figures of the model after `step` steps, their names beginning with the split's."""
        if step in (0, self.last_step):
            split, problems, config = "test", self.test, self.config
        else:
            split, problems = "validation", self.validation
            config = self.config.model_copy(update={"problems": self.config.validation_problems, "samples": 1})
        model.eval()
        engine = Engine(model, self.tokenizer.end_ids)
        assessment = assess(engine, self.tokenizer, problems, self.score, config, self.seed)
        lines = "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in assessment.transcripts)
        write_atomically(self.context.directory / "samples" / f"step-{step:06d}.jsonl", lines)
        return {f"{split}_{name}": value for name, value in assessment.metrics.items()}
