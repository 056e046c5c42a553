"""A reward for short right answers, as a plugin.

Only correct samples earn it: a reward for brevity alone teaches a model to say nothing.
"""

from __future__ import annotations

from pydantic import Field

from deepwright_core.evaluation import Answered
from deepwright_core.hookspecs import hookimpl
from deepwright_core.registry import Registry
from deepwright_rl.reward import Reward, RewardConfig


class BrevityConfig(RewardConfig):
    """Pays a correct sample for every token that it stays below `limit`."""

    name: str = "brevity"
    weight: float = 0.1
    limit: int = Field(128, ge=1)


@hookimpl
def deepwright_register(registry: Registry) -> None:
    @registry.add("reward", "brevity", config=BrevityConfig)
    def build(config: BrevityConfig) -> Reward:
        """1 for a right answer of no tokens, falling evenly to 0 at the limit."""

        def reward(sample: Answered) -> float:
            return max(0.0, 1.0 - len(sample.token_ids) / config.limit) if sample.correct else 0.0

        return reward
