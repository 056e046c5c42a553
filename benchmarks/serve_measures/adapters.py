"""Random LoRA adapters for a model that exists in memory only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from deepwright_core.finetune import adapter_files, targets
from deepwright_core.finetune.lora import LoraConfig

RANK = 16
TARGETS = ["attention"]


def random_adapter(model: nn.Module, directory: Path) -> None:
    """Write an adapter of all matrices of attention, of rank `RANK`."""
    adapted = targets.chosen(model, TARGETS)
    factors = {}
    for path, weight in adapted.items():
        *stack, outputs, inputs = weight.shape
        factors[f"{path}.a_RK"] = torch.randn(*stack, RANK, inputs) * 0.01
        factors[f"{path}.b_NR"] = torch.randn(*stack, outputs, RANK) * 0.01
    # An adapter's digest is of float32 weights, as files hold them.
    as_saved = {path: weight.detach().float() for path, weight in adapted.items()}
    adapter_files.write(directory, LoraConfig(rank=RANK, alpha=2.0 * RANK, targets=TARGETS), as_saved, factors)
