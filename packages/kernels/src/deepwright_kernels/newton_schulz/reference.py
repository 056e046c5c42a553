"""Newton-Schulz orthogonalisation as Muon uses it (Jordan et al. 2024), in plain torch.

Each matrix is divided by its Frobenius norm, so that its singular values are at most one, and then
X ← a·X + (b·G + c·G·G)·X with G = X·Xᵀ moves them all near one. The published coefficients are steep at zero and do
not converge: singular values end between 0.7 and 1.2. The shorter side is taken as the rows, where G is small.

Shapes: E matrices, M rows, N columns.
"""

from __future__ import annotations

from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def newton_schulz(matrices_EMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices, approximately: [E, M, N] in the input's dtype."""
    a, b, c = COEFFICIENTS
    x = matrices_EMN / (matrices_EMN.norm(dim=(-2, -1), keepdim=True) + SMALLEST_NORM)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
