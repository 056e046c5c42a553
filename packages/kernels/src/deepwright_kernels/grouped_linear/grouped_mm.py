"""A linear layer for each group of rows by torch's grouped product: no loop over groups, nothing read on the host.

Torch asks that rows of both operands and of the result begin at multiples of 16 bytes, so K and N must be multiples
of 4 in float32 and of 8 in bfloat16. Sizes that are not are padded with zeros, which costs a copy. torch.compile can
trace the product in bfloat16 only (torch 2.13).

Shapes: T rows in group order, E groups, K inputs, N outputs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

ALIGNMENT_BYTES = 16


def grouped_linear(x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """Row t of group e becomes x_t · weight_eᵀ."""
    multiple = ALIGNMENT_BYTES // x_TK.element_size()
    outputs, inputs = weight_ENK.shape[1:]
    pad_n, pad_k = -outputs % multiple, -inputs % multiple
    if pad_n or pad_k:
        x_TK = functional.pad(x_TK, (0, pad_k))
        weight_ENK = functional.pad(weight_ENK, (0, pad_k, 0, pad_n))
    y_TN = functional.grouped_mm(x_TK, weight_ENK.transpose(-2, -1), offs=offsets_E)
    return y_TN[:, :outputs] if pad_n else y_TN
