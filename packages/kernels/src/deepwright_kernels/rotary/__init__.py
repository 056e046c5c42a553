"""Rotary position embedding over interleaved pairs, with a gradient for the input."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, shape_of

NAME = "rotary"
dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:rotary",
        "triton": f"{__name__}.triton:rotary",
        "torch": f"{__name__}.complex_product:rotary",
    },
    elsewhere=("torch", "reference"),
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[..., 2i], x[..., 2i+1]) by the angles in cos and sin.

    x [..., R]; cos and sin [..., R/2] with the same shape, broadcastable to x's leading dimensions: for x [B, S, H, R]
    give [B, S, 1, R/2] or [S, 1, R/2]. They get no gradient.
    """
    require_dtype(NAME, "x", x, FLOATS)
    require(x.ndim >= 1 and x.shape[-1] % 2 == 0, NAME, "x", f"has shape {shape_of(x)}; expected an even last size")
    require(cos.shape == sin.shape, NAME, "sin", f"has shape {shape_of(sin)} and cos {shape_of(cos)}; expected equal")
    target = (*x.shape[:-1], x.shape[-1] // 2)
    for argument, tensor in (("cos", cos), ("sin", sin)):
        require_dtype(NAME, argument, tensor, FLOATS)
        require_device(NAME, argument, tensor, x.device)
        try:
            fits = torch.broadcast_shapes(tensor.shape, target) == target and tensor.shape[-1:] == target[-1:]
        except RuntimeError:
            fits = False
        require(fits, NAME, argument, f"has shape {shape_of(tensor)}, which does not broadcast to {list(target)}")
    y: Tensor = dispatch.run(NAME, x, cos, sin)
    return y
