"""A linear layer for each group of rows, in plain torch: one product a group, in a loop. The specification.

The loop reads the offsets on the host, so on a GPU it makes the host wait.

Shapes: T rows in group order, E groups, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear(x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """Row t of group e becomes x_t · weight_eᵀ. Rows after the last offset become zero."""
    parts, start = [], 0
    for expert, end in enumerate(offsets_E.tolist()):
        parts.append(x_TK[start:end] @ weight_ENK[expert].T)
        start = end
    parts.append(x_TK.new_zeros(x_TK.shape[0] - start, weight_ENK.shape[1]))
    return torch.cat(parts)
