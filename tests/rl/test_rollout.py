"""Rollouts: groups in order, draws of their own, rewards weighted; and masks that go by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from deepwright_core.engine import Completion, SamplingParams
from deepwright_core.tasks import Problem
from deepwright_core.tokenizer.bpe import BpeConfig, train
from deepwright_rl.reward import build_rewards
from deepwright_rl.rollout import pad, roll_out

TOKENIZER = train(BpeConfig(vocab_size=300), ["0 1 2 3 4 5 6 7 8 9"])
PROBLEMS = [Problem(f"{n:064x}", "sum", f"What is {n} + 1?", str(n + 1), {}) for n in range(2)]


def test_masks_by_hand() -> None:
    batch = pad([[5, 6, 7], [8]], [[1, 2], [3, 4, 1]], pad_id=0)
    assert batch.tokens_BS1.tolist() == [[5, 6, 7, 1, 2], [8, 3, 4, 1, 0]]
    # An input is masked in if the token after it was generated: the last prompt token scores the first of them.
    assert batch.mask_BS.int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]
    assert batch.real_BS.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_the_end_token_is_trained_and_padding_is_not_even_if_they_are_the_same_id() -> None:
    end = 2
    batch = pad([[5], [5, 5]], [[7, end], [7, 7, 7, end]], pad_id=end)
    targets = batch.tokens_BS1[:, 1:]
    assert [targets[row][batch.mask_BS[row]].tolist() for row in range(2)] == [[7, end], [7, 7, 7, end]]
    assert batch.mask_BS.sum(1).tolist() == [2, 4]


def test_tokens_that_no_policy_drew_leave_the_mask_and_take_their_log_probabilities_along(registry: Any) -> None:
    batch = pad([[5, 6], [8]], [[1, 2, 3], [3, 4]], pad_id=0, forced=[[False, True, False], []])
    assert batch.mask_BS.int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
    plain = completion("1")
    held = replace(plain, forced=[True] + [False] * (len(plain.token_ids) - 1))
    rollouts = roll_out(
        Scripted([held, plain]),
        TOKENIZER,
        PROBLEMS[:1],
        exact,
        build_rewards(registry, {"right": {"name": "correctness", "weight": 1.0}}),
        group_size=2,
        temperature=1.0,
        max_tokens=9,
        seed=0,
    )
    assert rollouts.forced == [held.forced, []]
    assert rollouts.sampler_logps == [held.logprobs[1:], plain.logprobs]


class Scripted:
    """An engine that answers from a script and remembers what it was asked."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self.completions = list(completions)
        self.asked: list[tuple[list[int], SamplingParams]] = []

    def generate(self, prompts: Any, params: Any, on_progress: Any = None) -> list[Completion]:
        self.asked = list(zip(prompts, params, strict=True))
        return self.completions


def completion(text: str, ended: bool = True) -> Completion:
    ids = TOKENIZER.encode(text) + ([TOKENIZER.eos_id] if ended else [])
    return Completion(0, ids, [-0.5 * n for n in range(len(ids))], "stop" if ended else "length")


def exact(pairs: Sequence[tuple[Problem, str]]) -> list[float]:
    return [float(answer == problem.answer) for problem, answer in pairs]


def test_groups_draws_and_rewards(registry: Any) -> None:
    engine = Scripted(
        [
            completion("1"),
            completion("0"),
            completion("1", ended=False),
            completion("2"),
            completion(""),
            completion("2"),
        ]
    )
    weighted = {"right": {"name": "correctness", "weight": 2.0}, "form": {"name": "format", "weight": 0.25}}
    rollouts = roll_out(
        engine,
        TOKENIZER,
        PROBLEMS,
        exact,
        build_rewards(registry, weighted),
        group_size=3,
        temperature=0.6,
        max_tokens=9,
        seed=100,
    )
    # Cut off: right, but not well-formed. Empty: well-formed in its tokens, but there is no answer.
    assert rollouts.rewards_PG.tolist() == [[2.25, 0.25, 2.0], [2.25, 0.0, 2.25]]
    assert rollouts.parts == {"right": pytest.approx(4 / 6), "form": pytest.approx(4 / 6)}
    assert rollouts.finished == [True, True, False, True, True, True]
    assert [sample.problem for sample in rollouts.samples] == [PROBLEMS[0]] * 3 + [PROBLEMS[1]] * 3
    assert rollouts.sampler_logps == [c.logprobs for c in engine.completions]
    prompts = [TOKENIZER.chat([{"role": "user", "content": problem.question}]) for problem in PROBLEMS]
    assert rollouts.prompts == [prompt for prompt in prompts for _ in range(3)]
    assert [prompt for prompt, _ in engine.asked] == rollouts.prompts
    params = [params for _, params in engine.asked]
    assert [p.seed for p in params] == list(range(100, 106))
    assert {(p.temperature, p.max_tokens, p.top_p, p.top_k, p.ignore_eos) for p in params} == {(0.6, 9, 1.0, 0, False)}
    assert rollouts.rewards_PG.dtype == torch.float32
