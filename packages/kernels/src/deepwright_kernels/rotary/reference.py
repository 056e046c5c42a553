"""Rotary position embedding (Su et al. 2021) over interleaved pairs, as DeepSeek's checkpoints store them.

Pair i of a head is (x[2i], x[2i+1]); it is turned by the angle whose cosine and sine are given. Computed in float32.

Shapes: R the rotated dimension, the last of x; cos and sin [..., R/2] broadcast over x's other dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., R], cos and sin broadcastable to [..., R/2] -> [..., R] in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x[..., 0::2].to(wide), x[..., 1::2].to(wide)
    cos, sin = cos.to(wide), sin.to(wide)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
