"""Newton-Schulz with torch's batched products, the sums fused into them: three products a step and nothing else.

A matrix with more rows than columns is worked on as it lies, with factors on the right.

Shapes: E matrices, M rows, N columns, S the shorter side of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import COEFFICIENTS, SMALLEST_NORM


def newton_schulz(matrices_EMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices, approximately: [E, M, N] in the input's dtype."""
    a, b, c = COEFFICIENTS
    x_EMN = matrices_EMN / (torch.linalg.vector_norm(matrices_EMN, dim=(-2, -1), keepdim=True) + SMALLEST_NORM)
    tall = x_EMN.shape[1] > x_EMN.shape[2]
    for _ in range(steps):
        gram_ESS = torch.bmm(x_EMN.mT, x_EMN) if tall else torch.bmm(x_EMN, x_EMN.mT)
        factor_ESS = torch.baddbmm(gram_ESS, gram_ESS, gram_ESS, beta=b, alpha=c)
        left, right = (x_EMN, factor_ESS) if tall else (factor_ESS, x_EMN)
        x_EMN = torch.baddbmm(x_EMN, left, right, beta=a)
    return x_EMN
