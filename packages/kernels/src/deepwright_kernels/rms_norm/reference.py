"""Root-mean-square norm (Zhang and Sennrich 2019), in plain torch: y = x / sqrt(mean(x²) + eps) · weight.

Computed in float32 whatever the input, rounded once at the end. After an addition to the residual stream the sum is
rounded to the stream's dtype first, and the norm is that of the rounded sum: it is what the next layers see.

Shapes: D the normed dimension, the last of x.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * scale * weight.to(wide)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [..., D] in the residual's dtype."""
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    summed = (x.to(wide) + residual.to(wide)).to(residual.dtype)
    return rms_norm(summed, weight, eps), summed
