"""What every way of fine-tuning offers the stages that change a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import nn

from ..registry import ComponentConfig


class FineTuneConfig(ComponentConfig):
    """Base of the configs of all ways of fine-tuning."""

    def problems(self, model: Callable[[], nn.Module], where: str) -> list[str]:
        """A sentence for each thing that cannot be done to this model (built on the meta device when asked for).
        `where` is the section's name."""
        return []


class FineTuning(Protocol):
    """A model made ready: what trains has requires_grad, and nothing else has.

    balances: whether routers may correct their bias from the experts' load.
    metrics, notes: what the stage should report of it.
    """

    balances: bool
    metrics: Mapping[str, float]
    notes: tuple[str, ...]

    def sampling(self) -> AbstractContextManager[None]:
        """Within this the model is only read, by the engine: what is dear to compute is computed once."""

    def finish(self, directory: Path) -> dict[str, str]:
        """Training is over: leave a plain model. Returns the outputs written beside it: artifact -> relative path."""
