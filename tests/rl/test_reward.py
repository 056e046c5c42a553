"""Rewards: what earns what, and how they are put together from a config."""

from __future__ import annotations

import pytest

from deepwright_core.errors import RequestError
from deepwright_core.evaluation import Answered
from deepwright_core.registry import Registry
from deepwright_core.tasks import Problem
from deepwright_rl.reward import build_rewards

PROBLEM = Problem("0" * 64, "sum", "?", "1", {})


def sample(correct: bool = True, well_formed: bool = True, answer: str = "1", thinking: str | None = None) -> Answered:
    return Answered(PROBLEM, [5, 2], thinking, answer, well_formed, correct, 0)


def test_correctness_is_the_scorers_word(registry: Registry) -> None:
    reward = registry.build("reward", {"name": "correctness"})
    assert reward(sample()) == 1.0 and reward(sample(correct=False)) == 0.0
    assert reward(sample(well_formed=False)) == 1.0


def test_format_wants_a_well_formed_answer_and_pays_nothing_for_thinking(registry: Registry) -> None:
    reward = registry.build("reward", {"name": "format"})
    assert reward(sample()) == reward(sample(thinking="long")) == reward(sample(correct=False)) == 1.0
    assert reward(sample(well_formed=False)) == reward(sample(answer="")) == reward(sample(answer=" \n")) == 0.0


def test_labels_weights_and_defaults(registry: Registry) -> None:
    built = build_rewards(registry, {"a": {"name": "correctness"}, "b": {"name": "format"}})
    assert {label: weight for label, (weight, _) in built.items()} == {"a": 1.0, "b": 0.1}
    assert built["a"][1](sample()) == 1.0


def test_a_wrong_reward_is_named_by_its_label(registry: Registry) -> None:
    with pytest.raises(
        RequestError, match=r"rl\.rewards\.mine\.name: There is no reward called 'corectness'\. Did you"
    ):
        build_rewards(registry, {"mine": {"name": "corectness"}})
    with pytest.raises(
        RequestError, match=r"rl\.rewards\.mine\.wieght is not an option of CorrectnessConfig\. Did you"
    ):
        build_rewards(registry, {"mine": {"name": "correctness", "wieght": 2}})
