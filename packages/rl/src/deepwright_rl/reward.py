"""Rewards: what a sample is worth.

A reward is a function of one scored sample. A run's reward is the weighted sum of those in `rl.rewards`. Thinking
itself earns nothing: a bare answer is as well-formed as a worked one, so a model that learns to think has learned it
from being right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepwright_core.evaluation import Answered
from deepwright_core.registry import ComponentConfig, Registry

Reward = Callable[[Answered], float]


class RewardConfig(ComponentConfig):
    """Base of every reward's config: `weight` scales it in the sum."""

    weight: float = 1.0


class CorrectnessConfig(RewardConfig):
    """1 when the task's own scorer accepts the answer."""

    name: str = "correctness"


class FormatConfig(RewardConfig):
    """1 when the reply ended by itself and its thinking, if any, was opened first and closed once before an answer."""

    name: str = "format"
    weight: float = 0.1


def build_correctness(config: CorrectnessConfig) -> Reward:
    """1 for a correct answer."""
    return lambda sample: float(sample.correct)


def build_format(config: FormatConfig) -> Reward:
    """1 for a well-formed reply with an answer."""
    return lambda sample: float(sample.well_formed and bool(sample.answer.strip()))


def build_rewards(registry: Registry, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, Reward]]:
    """Each labelled reward with its weight."""
    built = {}
    for label, values in configs.items():
        config = registry.parse("reward", values, f"rl.rewards.{label}")
        built[label] = (config.weight, registry.get("reward", config.name).build(config))
    return built


def register(registry: Registry) -> None:
    registry.add("reward", "correctness", config=CorrectnessConfig)(build_correctness)
    registry.add("reward", "format", config=FormatConfig)(build_format)
