"""The product of block-scaled FP8 matrices in plain torch. The specification.

y = Σ_v (a_v · b_vᵀ) · a_scale_v · b_scale_v over the blocks v of 128 along K, every sum in float32 (DeepSeek-V3 report,
section 3.3.2 and figure 7: tensor cores add up to 128 values, then the sum is scaled and promoted).

Shapes: M and N rows of the operands, K what is summed over, V = ⌈K/128⌉ blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8_layout import BLOCK


def fp8_matmul(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a · bᵀ, rounded once to `dtype`. b_scale: a row for each row of b, or for each 128 of them."""
    rows, inner = b_NK.shape
    scale_NV = b_scale if b_scale.shape[0] == rows else b_scale.repeat_interleave(BLOCK, 0)[:rows]
    y_MN = torch.zeros(a_MK.shape[0], rows, dtype=torch.float32, device=a_MK.device)
    with torch.autocast(a_MK.device.type, enabled=False):  # it would round the float32 products to 16 bits
        for v, start in enumerate(range(0, inner, BLOCK)):
            part = slice(start, start + BLOCK)
            product_MN = a_MK[:, part].float() @ b_NK[:, part].float().T
            y_MN += product_MN * a_scale_MV[:, v, None] * scale_NV[:, v]
    return y_MN.to(dtype)
