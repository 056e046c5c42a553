"""Every weight trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import nn

from .method import FineTuneConfig


class FullConfig(FineTuneConfig):
    """Every weight trains."""

    name: str = "full"


class Full:
    """The model as it is."""

    balances = True
    metrics: Mapping[str, float] = {}
    notes: tuple[str, ...] = ()

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self, directory: Path) -> dict[str, str]:
        return {}


def build(config: FullConfig, model: nn.Module, seed: int, new_rows: int) -> Full:
    """Every weight trains."""
    return Full()
