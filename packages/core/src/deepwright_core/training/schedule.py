"""Learning rate over a run, as a factor of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from ..registry import ComponentConfig, Registry

Schedule = Callable[[int], float]


class WSDConfig(ComponentConfig):
    """Warm-up, stable, decay (the shape DeepSeek-V3 trains with). Shares are of the whole run.

    final: the factor at the end. decay: shape of the last part.
    """

    name: str = "wsd"
    warmup_share: float = Field(0.02, ge=0, le=1)
    decay_share: float = Field(0.3, ge=0, le=1)
    final: float = Field(0.05, ge=0, le=1)
    decay: Literal["cosine", "linear"] = "cosine"

    @model_validator(mode="after")
    def _check(self) -> WSDConfig:
        if self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share {self.warmup_share} and decay_share {self.decay_share} add up to more than the whole run"
            )
        return self


class ConstantConfig(ComponentConfig):
    """Linear warm-up over `warmup_steps`, then constant."""

    name: str = "constant"
    warmup_steps: int = Field(0, ge=0)


def build_wsd(config: WSDConfig, total_steps: int) -> Schedule:
    """Warm-up, constant, then cosine or linear decay."""
    warmup = config.warmup_share * total_steps
    decay_start = total_steps * (1 - config.decay_share)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step < decay_start or decay_start >= total_steps:
            return 1.0
        done = (step - decay_start + 1) / (total_steps - decay_start)
        left = 0.5 * (1 + math.cos(math.pi * done)) if config.decay == "cosine" else 1 - done
        return config.final + (1 - config.final) * left

    return factor


def build_constant(config: ConstantConfig, total_steps: int) -> Schedule:
    """Linear warm-up, then constant."""
    return lambda step: min(1.0, (step + 1) / (config.warmup_steps + 1))


def register(registry: Registry) -> None:
    registry.add("schedule", "wsd", config=WSDConfig)(build_wsd)
    registry.add("schedule", "constant", config=ConstantConfig)(build_constant)
