"""Verifiable problems: where they come from, how they are split, how they are worked, how an answer is judged."""

from __future__ import annotations

from ..registry import Registry
from . import gym
from .gym import Task, part_mark, score
from .problem import SPLITS, Problem, Split, dump_problems, load_problems, split_of

__all__ = [
    "SPLITS",
    "Problem",
    "Split",
    "Task",
    "dump_problems",
    "load_problems",
    "part_mark",
    "register",
    "score",
    "split_of",
]


def register(registry: Registry) -> None:
    """Add the tasks `arithmetic` and `reasoning_gym`."""
    registry.add("task", "arithmetic", config=gym.ArithmeticConfig)(gym.build)
    registry.add("task", "reasoning_gym", config=gym.ReasoningGymConfig)(gym.build)
