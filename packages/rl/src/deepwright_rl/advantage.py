"""Advantages from a group's rewards: how much better a sample was than the others of its problem.

Shapes: P problems, G samples of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepwright_core.registry import ComponentConfig, Registry

Advantage = Callable[[Tensor], Tensor]

# Rewards of a group that differ by less than this are equal: dividing by their spread would magnify rounding.
EQUAL = 1e-6


class GroupNormalisedConfig(ComponentConfig):
    """(R - mean) / std over the group (DeepSeekMath, section 4.1.2); 0 for a group whose rewards are all equal."""

    name: str = "group_normalised"


class GroupCentredConfig(ComponentConfig):
    """R - mean over the group, without dividing by its spread (Dr. GRPO, Liu et al. 2025)."""

    name: str = "group_centred"


def centred(rewards_PG: Tensor) -> Tensor:
    """R - mean. Exactly 0 for a group of equal rewards, whose mean may differ from them by rounding: an optimizer that
    scales its steps, as Adam does, would follow even that."""
    equal_P1 = rewards_PG.amax(1, keepdim=True) - rewards_PG.amin(1, keepdim=True) < EQUAL
    return (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).masked_fill(equal_P1, 0.0)


def build_group_normalised(config: GroupNormalisedConfig) -> Advantage:
    """Centred and scaled by the group's spread (GRPO)."""

    def advantage(rewards_PG: Tensor) -> Tensor:
        if rewards_PG.shape[1] == 1:  # one sample has no spread
            return torch.zeros_like(rewards_PG)
        return centred(rewards_PG) / rewards_PG.std(dim=1, keepdim=True).clamp(min=EQUAL)

    return advantage


def build_group_centred(config: GroupCentredConfig) -> Advantage:
    """Centred only (Dr. GRPO)."""
    return centred


def register(registry: Registry) -> None:
    registry.add("advantage", "group_normalised", config=GroupNormalisedConfig)(build_group_normalised)
    registry.add("advantage", "group_centred", config=GroupCentredConfig)(build_group_centred)
