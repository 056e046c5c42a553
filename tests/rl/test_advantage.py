"""Advantages: the group's own mean and spread, and exactly nothing where a group says nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_core.registry import Registry
from deepwright_rl.advantage import GroupNormalisedConfig, build_group_normalised

NORMALISED = build_group_normalised(GroupNormalisedConfig())


@pytest.mark.parametrize(
    ("name", "want"),
    [
        # Group 0: mean 1/2, spread √(1/3). Group 1: mean 1/4, spread 1/2. Group 2: mean 2, spread √(2/3).
        (
            "group_normalised",
            [
                [math.sqrt(3) / 2, -math.sqrt(3) / 2, -math.sqrt(3) / 2, math.sqrt(3) / 2],
                [-0.5, 1.5, -0.5, -0.5],
                [-math.sqrt(3 / 2), 0, 0, math.sqrt(3 / 2)],
            ],
        ),
        ("group_centred", [[0.5, -0.5, -0.5, 0.5], [-0.25, 0.75, -0.25, -0.25], [-1, 0, 0, 1]]),
    ],
)
def test_by_hand(registry: Registry, name: str, want: list[list[float]]) -> None:
    advantage = registry.build("advantage", {"name": name})
    rewards_PG = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 2, 2, 3]])
    torch.testing.assert_close(advantage(rewards_PG), torch.tensor(want))


@pytest.mark.parametrize("name", ["group_normalised", "group_centred"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1.1, -0.3, 1e6 / 3])
def test_equal_rewards_are_worth_exactly_nothing(registry: Registry, name: str, reward: float) -> None:
    """Also where the mean of equal numbers is not quite the number."""
    advantage = registry.build("advantage", {"name": name})
    for group in range(1, 20):
        assert (advantage(torch.full((2, group), reward)) == 0).all(), group


def test_rounding_is_not_magnified() -> None:
    rewards_PG = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3]]) + torch.tensor([[6e-8, 0, 0, 0]])
    assert rewards_PG.unique().numel() == 2
    assert (NORMALISED(rewards_PG) == 0).all()


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers(1, 9), st.integers(-9, 9))
@settings(max_examples=100, deadline=None)
def test_scale_and_shift_of_the_rewards_do_not_matter(rewards: list[int], scale: int, shift: int) -> None:
    rewards_PG = torch.tensor([rewards], dtype=torch.float32)
    advantages = NORMALISED(rewards_PG)
    torch.testing.assert_close(NORMALISED(rewards_PG * scale + shift), advantages, atol=1e-4, rtol=1e-4)
    assert abs(advantages.sum().item()) < 1e-4
    if len(set(rewards)) > 1:
        assert advantages.std().item() == pytest.approx(1.0, abs=1e-4)
