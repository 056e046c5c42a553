"""Newton-Schulz with torch's batched products, the sums fused into them: three products a step and nothing else.

Shapes: E matrices, M rows, N columns, M the shorter side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import COEFFICIENTS, SMALLEST_NORM


def scaled_wide(matrices_EMN: Tensor) -> tuple[Tensor, bool]:
    """The matrices over their norms with the shorter side as rows, contiguous; whether that transposed them."""
    norm_E11 = torch.linalg.vector_norm(matrices_EMN, dim=(-2, -1), keepdim=True) + SMALLEST_NORM
    tall = matrices_EMN.shape[-2] > matrices_EMN.shape[-1]
    wide = matrices_EMN.mT if tall else matrices_EMN
    return (wide / norm_E11).contiguous(), tall


def newton_schulz(matrices_EMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices, approximately: [E, M, N] in the input's dtype."""
    a, b, c = COEFFICIENTS
    x_EMN, tall = scaled_wide(matrices_EMN)
    for _ in range(steps):
        gram_EMM = torch.bmm(x_EMN, x_EMN.mT)
        factor_EMM = torch.baddbmm(gram_EMM, gram_EMM, gram_EMM, beta=b, alpha=c)
        x_EMN = torch.baddbmm(x_EMN, factor_EMM, x_EMN, beta=a)
    return x_EMN.mT if tall else x_EMN
