"""Rotary position embedding (Su et al. 2021) over interleaved pairs, as DeepSeek's checkpoints store them.

Pair i of a head is (x[2i], x[2i+1]); it is turned by the angle whose cosine and sine are given. Computed in float32.
A query or key of latent attention is turned in its last part only (DeepSeek-V2, eq. 14-19): `rotary_tail`.

Shapes: R the rotated dimension, P what stands before it; cos and sin [..., R/2] broadcast over x's other dimensions.
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


def rotary_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., P + R], cos and sin broadcastable to [..., R/2] -> x with its last R values turned."""
    rotated = 2 * cos.shape[-1]
    kept, tail = x.split([x.shape[-1] - rotated, rotated], -1)
    return torch.cat((kept, rotary(tail, cos, sin)), -1)
