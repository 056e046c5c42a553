"""Advantages from a group's rewards: how much better a sample was than the others of its problem.

Shapes: P problems, G samples of each.
"""

from __future__ import annotations

from collections.abc import Callable

from deepwright_core.registry import ComponentConfig, Registry
from torch import Tensor

Advantage = Callable[[Tensor], Tensor]

# Rewards of a group that differ by less than this are equal: dividing by their spread would magnify rounding.
EQUAL = 1e-6


class GroupNormalisedConfig(ComponentConfig):
    """(R - mean) / std over the group (DeepSeekMath, section 4.1.2); 0 for a group whose rewards are all equal."""

    name: str = "group_normalised"


class GroupCentredConfig(ComponentConfig):
    """R - mean over the group, without dividing by its spread (Dr. GRPO, Liu et al. 2025)."""

    name: str = "group_centred"


def build_group_normalised(config: GroupNormalisedConfig) -> Advantage:
    """Centred and scaled by the group's spread (GRPO)."""

    def advantage(rewards_PG: Tensor) -> Tensor:
        if rewards_PG.shape[1] == 1:
            return rewards_PG * 0
        spread_P1 = rewards_PG.std(dim=1, keepdim=True)
        centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        return (centred_PG / spread_P1.clamp(min=EQUAL)).masked_fill(spread_P1 < EQUAL, 0.0)

    return advantage


def build_group_centred(config: GroupCentredConfig) -> Advantage:
    """Centred only (Dr. GRPO)."""
    return lambda rewards_PG: rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


def register(registry: Registry) -> None:
    registry.add("advantage", "group_normalised", config=GroupNormalisedConfig)(build_group_normalised)
    registry.add("advantage", "group_centred", config=GroupCentredConfig)(build_group_centred)
