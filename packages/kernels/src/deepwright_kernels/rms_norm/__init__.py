"""Root-mean-square norm over the last dimension, alone or after a residual addition, with gradients for all inputs."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, require_shape

NORM, ADD_NORM = "rms_norm", "add_rms_norm"
for name in (NORM, ADD_NORM):
    dispatch.operator(
        name,
        {
            "reference": f"{__name__}.reference:{name}",
            "triton": f"{__name__}.triton:{name}",
            "torch": f"{__name__}.analytic:{name}",
        },
        elsewhere=("torch", "reference"),
    )


def _check(operator: str, x: Tensor, weight: Tensor, eps: float) -> None:
    require_dtype(operator, "x", x, FLOATS)
    require(x.ndim >= 1 and x.shape[-1] > 0, operator, "x", "has no last dimension to take the mean over")
    require_shape(operator, "weight", weight, (x.shape[-1],), "[D]")
    require_dtype(operator, "weight", weight, FLOATS)
    require_device(operator, "weight", weight, x.device)
    require(eps >= 0, operator, "eps", f"is {eps}; expected a number that is not negative")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype; statistics and products in float32."""
    _check(NORM, x, weight, eps)
    y: Tensor = dispatch.run(NORM, x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both in the residual's dtype, which the sum is rounded to first.

    x and residual [..., D] of one shape, weight [D]. What a block does between two of its layers: add to the residual
    stream, and norm what the next layer reads. Gradients for x, residual and weight, from both results.
    """
    _check(ADD_NORM, x, weight, eps)
    require_shape(ADD_NORM, "residual", residual, tuple(x.shape), "x's shape")
    require_dtype(ADD_NORM, "residual", residual, FLOATS)
    require_device(ADD_NORM, "residual", residual, x.device)
    normed, summed = dispatch.run(ADD_NORM, x, residual, weight, eps)
    return normed, summed
