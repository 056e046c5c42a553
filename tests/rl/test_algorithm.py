"""GRPO and its relatives are choices of advantage and loss: each has the ones that its paper says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepwright_core.errors import RequestError
from deepwright_core.registry import Registry
from deepwright_rl.algorithm import Algorithm
from deepwright_rl.policy_loss import PolicyBatch


def build(registry: Registry, **options: Any) -> Algorithm:
    return registry.build("algorithm", options)


def gain_at(algorithm: Algorithm, ratio: float) -> float:
    """What a token with advantage 1 is worth at a ratio: tells the upper clip."""
    one = torch.ones(1, 1)
    batch = PolicyBatch(one * torch.tensor(ratio).log(), one * 0, None, torch.ones(1), one.bool(), one)
    return -float(algorithm.policy_loss(batch).loss)


@pytest.mark.parametrize(
    ("name", "divides_by_spread", "aggregation", "reference", "upper_clip"),
    [
        ("grpo", True, "sequence", True, 1.2),
        ("dr_grpo", False, "constant", False, 1.2),
        ("dapo", True, "token", False, 1.28),
    ],
)
def test_the_family(
    registry: Registry, name: str, divides_by_spread: bool, aggregation: str, reference: bool, upper_clip: float
) -> None:
    algorithm = build(registry, name=name)
    spread = algorithm.advantage(torch.tensor([[0.0, 3.0]]))[0, 1].item()
    assert spread == pytest.approx(0.5**0.5 if divides_by_spread else 1.5)
    assert algorithm.aggregation == aggregation
    assert algorithm.needs_reference == reference
    assert gain_at(algorithm, 5.0) == pytest.approx(upper_clip)


def test_parts_can_be_exchanged(registry: Registry) -> None:
    algorithm = build(
        registry,
        name="grpo",
        advantage={"name": "group_centred"},
        policy_loss={"name": "clipped", "epsilon_high": 10.0, "kl_coefficient": 0.0, "aggregation": "token"},
    )
    assert algorithm.advantage(torch.tensor([[0.0, 3.0]])).tolist() == [[-1.5, 1.5]]
    assert (algorithm.aggregation, algorithm.needs_reference) == ("token", False)
    assert gain_at(algorithm, 9.0) == pytest.approx(9.0)


def test_parts_are_checked_with_the_whole(registry: Registry) -> None:
    with pytest.raises(RequestError) as caught:
        build(
            registry,
            name="grpo",
            advantage={"name": "group_normalized"},
            policy_loss={"name": "clipped", "epsilon_low": 0, "epsilon_hihg": 1},
        )
    paths = [problem.split(" ")[0] for problem in caught.value.problems]
    assert sorted(paths) == [
        "algorithm.advantage.name:",
        "algorithm.policy_loss.epsilon_hihg",
        "algorithm.policy_loss.epsilon_low",
    ]
