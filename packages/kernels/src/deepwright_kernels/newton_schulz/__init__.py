"""Newton-Schulz orthogonalisation for Muon, batched over matrices of one shape. No gradients: it is an update rule."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_dtype, require_shape, shape_of

NAME = "newton_schulz"


def _kernel_needs(matrices_EMN: Tensor, steps: int) -> str | None:
    if matrices_EMN.is_cuda and matrices_EMN.dtype not in (torch.bfloat16, torch.float16):
        return "its products are of bfloat16 and float16; those of float32 are torch's"
    if matrices_EMN.is_cuda and (matrices_EMN.shape[-1] % 8 or min(matrices_EMN.shape[-2:]) % 8):
        return f"the matrices are {shape_of(matrices_EMN[0])} and its rows have to start at multiples of 8 values"
    return None


def _fastest(matrices_EMN: Tensor, steps: int = 5) -> tuple[str, ...]:
    """Half of two products saves more than a kernel's launch once a matrix fills a few tiles."""
    large = matrices_EMN.ndim == 3 and min(matrices_EMN.shape[-2:]) >= 512
    if large and _kernel_needs(matrices_EMN, steps) is None:
        return ("triton", "torch", "reference")
    return ("torch", "reference")


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:newton_schulz",
        "triton": f"{__name__}.triton:newton_schulz",
        "torch": f"{__name__}.fused_sums:newton_schulz",
    },
    cuda=_fastest,
    elsewhere=("torch", "reference"),
    needs={"triton": _kernel_needs},
)


def newton_schulz(matrices_EMN: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, approximately, after `steps` of Muon's quintic: [E, M, N] in the input's dtype.

    X ← a·X + (b·G + c·G·G)·X, G = X·Xᵀ, from X divided by its Frobenius norm (Jordan et al. 2024). Each of the E
    matrices by itself. A matrix of zeros stays one. No gradients.
    """
    require_shape(NAME, "matrices_EMN", matrices_EMN, (None, None, None), "[E, M, N]")
    require_dtype(NAME, "matrices_EMN", matrices_EMN, FLOATS)
    require(
        not (matrices_EMN.requires_grad and torch.is_grad_enabled()),
        NAME,
        "matrices_EMN",
        "requires a gradient and an update rule has none; call it under torch.no_grad()",
    )
    require(steps >= 1, NAME, "steps", f"is {steps}; expected at least 1")
    update_EMN: Tensor = dispatch.run(NAME, matrices_EMN, steps)
    return update_EMN
