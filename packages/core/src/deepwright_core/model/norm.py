"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepwright_kernels import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
