"""Root-mean-square norm over the last dimension, with gradients for input and weight."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, require_shape

NAME = "rms_norm"
dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:rms_norm",
        "triton": f"{__name__}.triton:rms_norm",
        "torch": f"{__name__}.analytic:rms_norm",
    },
    elsewhere=("torch", "reference"),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype; statistics and products in float32."""
    require_dtype(NAME, "x", x, FLOATS)
    require(x.ndim >= 1 and x.shape[-1] > 0, NAME, "x", "has no last dimension to take the mean over")
    require_shape(NAME, "weight", weight, (x.shape[-1],), "[D]")
    require_dtype(NAME, "weight", weight, FLOATS)
    require_device(NAME, "weight", weight, x.device)
    require(eps >= 0, NAME, "eps", f"is {eps}; expected a number that is not negative")
    y: Tensor = dispatch.run(NAME, x, weight, eps)
    return y
