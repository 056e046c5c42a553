"""Evaluation: pass@k, greedy, intervals and transcripts from completions that a test wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepwright_core.engine import Completion, SamplingParams
from deepwright_core.evaluation import EvaluationConfig, Examiner, assess, bootstrap_interval, mark
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import Registry
from deepwright_core.stage import StageContext
from deepwright_core.tasks import Problem, dump_problems
from deepwright_core.tokenizer.bpe import BpeConfig, train
from deepwright_core.tracking import JsonlTracker, SilentProgress

TOKENIZER = train(BpeConfig(vocab_size=300), ["0 1 2 3 4 5 6 7 8 9"])
PROBLEMS = [Problem(f"{n:064x}", "sum", f"What is {n} + 1?", str(n + 1), {}) for n in range(4)]


def ids(text: str) -> list[int]:
    """`text` with <think>, </think> and <end> as the special tokens."""
    specials = {"<think>": TOKENIZER.think_start_id, "</think>": TOKENIZER.think_end_id, "<end>": TOKENIZER.eos_id}
    for name, special in specials.items():
        before, found, after = text.partition(name)
        if found:
            return [*ids(before), special, *ids(after)]
    return TOKENIZER.encode(text)


def completion(text: str) -> Completion:
    token_ids = ids(text)
    return Completion(0, token_ids, [0.0] * len(token_ids), "stop" if text.endswith("<end>") else "length")


def exact(pairs: Sequence[tuple[Problem, str]]) -> list[float]:
    return [float(answer == problem.answer) for problem, answer in pairs]


class Scripted:
    """An engine that answers from a script and remembers what it was asked."""

    def __init__(self, script: Sequence[str]) -> None:
        self.script = script
        self.asked: list[tuple[list[int], SamplingParams]] = []

    def generate(self, prompts: Any, params: Any, on_progress: Any = None) -> list[Completion]:
        self.asked += zip(prompts, params, strict=True)
        return [completion(text) for text in self.script[: len(prompts)]]


def test_replies_are_taken_apart_and_scored() -> None:
    replies = ["1<end>", "<think>0 1</think>2<end>", "3", "<think>0 0</think>9<end>"]
    right, thought, cut, wrong = mark(TOKENIZER, PROBLEMS, [completion(reply) for reply in replies], exact)
    assert (right.answer, right.thinking, right.correct, right.well_formed) == ("1", None, True, True)
    assert (thought.answer, thought.thinking, thought.correct) == ("2", "0 1", True)
    assert thought.thinking_tokens == len(TOKENIZER.encode("0 1")) and right.thinking_tokens == 0
    assert (cut.correct, cut.well_formed) == (True, False)
    assert not wrong.correct
    assert wrong.transcript() == {
        "problem": PROBLEMS[3].id,
        "question": "What is 3 + 1?",
        "expected": "4",
        "thinking": "0 0",
        "answer": "9",
        "correct": False,
        "well_formed": True,
        "tokens": len(wrong.token_ids),
    }


def test_unfinished_thinking_is_counted_to_its_end_and_has_no_answer() -> None:
    (sample,) = mark(TOKENIZER, PROBLEMS[:1], [completion("<think>1 1 1")], exact)
    assert sample.answer == "" and not sample.correct and not sample.well_formed
    assert sample.thinking_tokens == len(TOKENIZER.encode("1 1 1"))


def test_part_marks_are_not_correct() -> None:
    (sample,) = mark(TOKENIZER, PROBLEMS[:1], [completion("1<end>")], lambda pairs: [0.99])
    assert not sample.correct


def test_the_figures_by_hand() -> None:
    greedy = ["1<end>", "2<end>", "0<end>", "<think>3</think>4<end>"]
    sampled = [
        *["1<end>", "0<end>", "1<end>"],  # 2 of 3
        *["0<end>", "0<end>", "0<end>"],  # none
        *["3<end>", "<think>2</think>3<end>", "3"],  # all, one of them cut off
        *["0<end>", "4<end>", "<think>0</think>0<end>"],  # 1 of 3
    ]
    engine = Scripted(greedy + sampled)
    config = EvaluationConfig(samples=3, temperature=0.7, max_tokens=11)
    result = assess(engine, TOKENIZER, PROBLEMS, exact, config, seed=5)
    figures = result.metrics
    assert figures["greedy_accuracy"] == 0.75
    assert figures["pass_at_1"] == pytest.approx(6 / 12)
    assert figures["pass_at_3"] == 0.75
    assert figures["thinking_share"] == pytest.approx(2 / 12)
    assert figures["thinking_tokens"] == pytest.approx(2 / 12)
    assert figures["well_formed_share"] == pytest.approx(11 / 12)
    assert figures["response_tokens"] == pytest.approx(np.mean([len(ids(text)) for text in sampled]))
    assert result.tokens == sum(len(ids(text)) for text in greedy + sampled)
    assert [t["answer"] for t in result.transcripts] == ["1", "2", "0", "4"]
    assert figures["pass_at_1_low"] <= 0.5 <= figures["pass_at_1_high"]
    assert (figures["pass_at_1_low"], figures["pass_at_1_high"]) == bootstrap_interval([2 / 3, 0, 1, 1 / 3])
    assert (figures["greedy_accuracy_low"], figures["greedy_accuracy_high"]) == bootstrap_interval([1, 1, 0, 1])

    prompts = [TOKENIZER.chat([{"role": "user", "content": problem.question}]) for problem in PROBLEMS]
    assert [prompt for prompt, _ in engine.asked] == prompts + [p for p in prompts for _ in range(3)]
    params = [params for _, params in engine.asked]
    assert [p.greedy for p in params] == [True] * 4 + [False] * 12
    assert {p.temperature for p in params[4:]} == {0.7} and {p.max_tokens for p in params} == {11}
    assert len({p.seed for p in params[4:]}) == 12


def test_two_models_are_compared_on_equal_draws_and_two_seeds_are_not() -> None:
    asked = []
    for seed in (1, 1, 2):
        engine = Scripted(["1<end>"] * 12)
        assess(engine, TOKENIZER, PROBLEMS, exact, EvaluationConfig(samples=2), seed)
        asked.append([params.seed for _, params in engine.asked[4:]])
    assert asked[0] == asked[1] and not set(asked[0]) & set(asked[2])


def test_only_as_many_problems_as_asked_for() -> None:
    for wanted, expected in ((3, 3), (0, 4), (9, 4)):
        engine = Scripted(["1<end>"] * 8)
        assess(engine, TOKENIZER, PROBLEMS, exact, EvaluationConfig(samples=1, problems=wanted), 0)
        assert len(engine.asked) == 2 * expected


def test_one_sample_makes_pass_at_1_alone() -> None:
    engine = Scripted(["1<end>", "0<end>", "0<end>", "0<end>", "0<end>", "2<end>", "3<end>", "0<end>"])
    figures = assess(engine, TOKENIZER, PROBLEMS, exact, EvaluationConfig(samples=1), 0).metrics
    assert figures["greedy_accuracy"] == 0.25 and figures["pass_at_1"] == 0.5


def test_intervals_cover_what_they_should() -> None:
    assert bootstrap_interval([1.0] * 9) == (1.0, 1.0)
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    half = 1.96 * (0.25 / 400) ** 0.5
    assert low == pytest.approx(0.5 - half, abs=0.006) and high == pytest.approx(0.5 + half, abs=0.006)
    assert bootstrap_interval([0.0, 1.0] * 200) == (low, high)


def test_repeating_the_samples_of_a_problem_does_not_narrow_the_interval() -> None:
    """Eight copies of one answer are one observation: the interval is over problems."""
    answers = ["1<end>", "0<end>", "3<end>", "0<end>"]
    once = assess(Scripted(answers + answers), TOKENIZER, PROBLEMS, exact, EvaluationConfig(samples=1), 0).metrics
    repeated = Scripted(answers + [answer for answer in answers for _ in range(8)])
    often = assess(repeated, TOKENIZER, PROBLEMS, exact, EvaluationConfig(samples=8), 0).metrics
    assert [often[f"pass_at_1_{end}"] for end in ("low", "high")] == [
        once[f"pass_at_1_{end}"] for end in ("low", "high")
    ]


def test_the_test_problems_are_looked_at_before_the_first_and_after_the_last_step_only(
    registry: Registry, tmp_path: Path
) -> None:
    problems = tmp_path / "problems"
    problems.mkdir()
    (problems / "test.jsonl").write_text(dump_problems(PROBLEMS[:2]))
    (problems / "validation.jsonl").write_text(dump_problems(PROBLEMS[2:]))
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=8,
        layers=1,
        intermediate_size=8,
        max_positions=64,
        attention={"name": "gqa", "heads": 1, "kv_heads": 1, "head_dim": 8},
        ffn={"name": "dense"},
    )
    model = build_model(registry, config, seed=0).train()
    asked: list[list[str]] = []

    def score(pairs: Sequence[tuple[Problem, str]]) -> list[float]:
        asked.append([problem.id for problem, _ in pairs])
        return [1.0] * len(pairs)

    context = StageContext(tmp_path, JsonlTracker(tmp_path / "m.jsonl"), SilentProgress(), registry, None)
    settings = EvaluationConfig(samples=2, max_tokens=3, validation_problems=1)
    examiner = Examiner("sft", TOKENIZER, problems, score, settings, 0, 10, context)
    test, validation = [problem.id for problem in PROBLEMS[:2]], [problem.id for problem in PROBLEMS[2:]]
    for step, prefix, want in ((0, "test_", test), (5, "validation_", validation[:1]), (10, "test_", test)):
        figures = examiner(model, step)
        assert set(asked[-1]) == set(want)
        assert all(name.startswith(prefix) for name in figures)
        assert figures[f"{prefix}greedy_accuracy"] == 1.0
        lines = (tmp_path / "samples" / f"step-{step:06d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["problem"] for line in lines] == want
    assert [len(pairs) for pairs in asked] == [2 + 4, 1 + 1, 2 + 4]
