"""A block-scaled FP8 product for each group of rows, in plain torch: one product a group, in a loop. The specification.

The loop reads the ends on the host, so on a GPU it makes the host wait.

Shapes: T rows in group order, E groups, N outputs, K what is summed over, U = ⌈N/128⌉ and V = ⌈K/128⌉ blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8_matmul.reference import fp8_matmul


def fp8_grouped_matmul(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Row t of group e becomes a_t · b_eᵀ. Rows after the last end become zero."""
    y_TN = torch.zeros(a_TK.shape[0], b_ENK.shape[1], dtype=dtype, device=a_TK.device)
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > start:
            rows = slice(start, end)
            y_TN[rows] = fp8_matmul(a_TK[rows], a_scale_TV[rows], b_ENK[group], b_scale_EUV[group], dtype)
        start = end
    return y_TN
