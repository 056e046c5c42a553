"""Products summed over the tokens of each group, in plain torch: one product a group, in a loop. The specification.

The loop reads the ends on the host, so on a GPU it makes the host wait.

Shapes: M and N rows of the operands, T tokens in group order, E groups, V = ⌈T/128⌉ blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8_layout import BLOCK
from ..fp8_matmul.reference import fp8_matmul


def fp8_grouped_outer(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """y_e = a_e · b_eᵀ over the columns of group e; zeros for an empty one."""
    y_EMN = torch.zeros(ends_E.shape[0], a_MT.shape[0], b_NT.shape[0], dtype=dtype, device=a_MT.device)
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > start:
            columns, blocks = slice(start, end), slice(start // BLOCK, end // BLOCK)
            y_EMN[group] = fp8_matmul(
                a_MT[:, columns], a_scale_MV[:, blocks], b_NT[:, columns], b_scale_NV[:, blocks], dtype
            )
        start = end
    return y_EMN
