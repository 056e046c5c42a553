"""Experts spread over ranks: each rank loads the whole model but for its experts, of which it loads its share.

A mixture takes part by `spread`; nothing here knows which mixtures there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from ..errors import RequestError
from ..model.directory import load_model
from ..model.transformer import Transformer
from ..registry import Registry
from .ranks import Ranks


@runtime_checkable
class Spreadable(Protocol):
    """A mixture whose experts can lie on several ranks."""

    def spread(self, ranks: Ranks) -> list[str]:
        """Keep this rank's share of the experts, their weights unset, and add results up over the ranks from now on.

        Returns the names below this module of the stacked weights that are now shares of their first dimension.
        """


def spread_experts(model: nn.Module, ranks: Ranks) -> dict[str, slice]:
    """Spread the experts of every mixture. Returns which part of each stack is this rank's, by the stack's path."""
    parts = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, Spreadable):
            for name in module.spread(ranks):
                own = model.get_parameter(f"{path}.{name}").shape[0]
                parts[f"{path}.{name}"] = slice(ranks.rank * own, (ranks.rank + 1) * own)
    if not parts:
        raise RequestError(
            "The model has no mixture of experts whose experts could be spread over ranks; expected one with ffn moe."
        )
    return parts


def load_share(
    directory: Path, registry: Registry, ranks: Ranks, device: torch.device, dtype: torch.dtype | None = None
) -> Transformer:
    """Load this rank's part of a model directory, in evaluation mode; of the experts' files only that is read."""
    return load_model(directory, registry, device, dtype, lambda model: spread_experts(model, ranks))
