"""Root-mean-square norm (Zhang and Sennrich 2019), in plain torch: y = x / sqrt(mean(x²) + eps) · weight.

Computed in float32 whatever the input, rounded once at the end.

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
