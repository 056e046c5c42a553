"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepwright_kernels import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x), in one pass over memory; both in the residual stream's dtype."""
        return add_rms_norm(x, residual, self.weight, self.eps)
