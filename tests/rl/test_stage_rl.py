"""The stage rl in its parts: which problems a step sees, the shuffled control, and what is reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deepwright_core.evaluation import Answered
from deepwright_core.registry import Registry
from deepwright_core.tasks import Problem
from deepwright_rl import stage_rl
from deepwright_rl.rollout import Rollouts
from deepwright_rl.stage_rl import ProblemOrder, RLConfig, rollout_metrics, shuffle_in_groups

PROBLEMS = [Problem(f"{n:064x}", "sum", "?", str(n), {}) for n in range(10)]


def test_every_problem_comes_once_a_pass_whatever_the_step_size() -> None:
    order = ProblemOrder(PROBLEMS, 4, seed=1)
    seen = [problem.answer for step in range(10) for problem in order.at(step)]
    passes = [tuple(seen[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(a_pass) == sorted(problem.answer for problem in PROBLEMS) for a_pass in passes)
    assert len(set(passes)) == 4


def test_a_step_sees_the_same_problems_after_a_resume() -> None:
    assert ProblemOrder(PROBLEMS, 4, seed=1).at(7) == ProblemOrder(PROBLEMS, 4, seed=1).at(7)
    assert ProblemOrder(PROBLEMS, 4, seed=2).at(7) != ProblemOrder(PROBLEMS, 4, seed=1).at(7)


def test_a_step_may_be_larger_than_a_pass() -> None:
    (problems,) = [ProblemOrder(PROBLEMS, 25, seed=0).at(0)]
    counts = [sum(problem == each for problem in problems) for each in PROBLEMS]
    assert len(problems) == 25 and set(counts) <= {2, 3}


def rollouts(rewards: list[list[float]]) -> Rollouts:
    count = sum(len(group) for group in rewards)

    def sample(n: int) -> Answered:
        return Answered(PROBLEMS[0], [5] * (n + 1), "so" if n == 0 else None, "1", True, n % 2 == 0, 6 * (n == 0))

    samples = [sample(n) for n in range(count)]
    parts = {"right": 0.5}
    return Rollouts([[1]] * count, samples, [], [n != 3 for n in range(count)], torch.tensor(rewards), parts)


def test_the_control_keeps_each_groups_rewards_and_not_who_earned_them() -> None:
    torch.manual_seed(0)
    before = torch.rand(6, 8)
    shuffled = replace(rollouts([[0.0]]), rewards_PG=before.clone())
    shuffle_in_groups(shuffled, seed=4)
    torch.testing.assert_close(shuffled.rewards_PG.sort(1).values, before.sort(1).values)
    orders = [
        tuple((row == value).nonzero().item() for value in old)
        for row, old in zip(shuffled.rewards_PG, before, strict=True)
    ]
    assert len(set(orders)) > 1 and (shuffled.rewards_PG != before).any(1).sum() >= 5
    again = replace(shuffled, rewards_PG=before.clone())
    shuffle_in_groups(again, seed=4)
    assert torch.equal(again.rewards_PG, shuffled.rewards_PG)


def test_what_is_reported_of_a_batch() -> None:
    figures = rollout_metrics(rollouts([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))
    assert figures == pytest.approx(
        {
            "reward": 4 / 6,
            "reward_right": 0.5,
            "accuracy": 0.5,
            "response_tokens": 3.5,
            "thinking_tokens": 1.0,
            "thinking_share": 1 / 6,
            "truncated_share": 1 / 6,
            "zero_advantage_groups": 0.5,
        }
    )


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"problems_per_step": 2, "group_size": 3, "minibatches": 7}, ["rl.minibatches is 7; expected at most the 6 "]),
        ({"rewards": {}}, ["rl.rewards is empty; expected at least one reward"]),
    ],
)
def test_impossible_combinations(registry: Registry, changes: dict[str, Any], problems: list[str]) -> None:
    found = stage_rl.check(RLConfig(**changes), {})
    assert len(found) == len(problems)
    assert all(have.startswith(want) for have, want in zip(found, problems, strict=True))
