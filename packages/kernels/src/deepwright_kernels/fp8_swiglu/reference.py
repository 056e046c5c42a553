"""SwiGLU (Shazeer 2020) and its gradient, then quantised, in plain torch. The specification.

Computed in float32 and rounded to the input's dtype before it is quantised, as separate operators would do.

h = silu(g) · u with silu(g) = g · σ(g). Given dh: du = dh · silu(g) and dg = dh · u · σ(g) · (1 + g · (1 − σ(g))).

Shapes: T tokens, I hidden size, J = 2 I gates and ups, U = ⌈T/128⌉ and V blocks of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8_rows.reference import quantise_fp8_columns, quantise_fp8_rows, quantise_fp8_rows_and_columns


def swiglu_quantise_fp8(gate_up_TJ: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [T, I] and scales [T, V] of silu(gate) · up."""
    gate_TI, up_TI = gate_up_TJ.float().chunk(2, -1)
    hidden_TI = gate_TI * gate_TI.sigmoid() * up_TI
    return quantise_fp8_rows(hidden_TI.to(gate_up_TJ.dtype), power_of_two_scales)


def swiglu_backward_quantise_fp8(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of gate and up along rows and along columns, and the hidden values along columns."""
    grad_TI = grad_TI.float()
    gate_TI, up_TI = gate_up_TJ.float().chunk(2, -1)
    sigmoid_TI = gate_TI.sigmoid()
    silu_TI = gate_TI * sigmoid_TI
    grad_gate_TI = grad_TI * up_TI * sigmoid_TI * (1 + gate_TI * (1 - sigmoid_TI))
    grad_TJ = torch.cat([grad_gate_TI, grad_TI * silu_TI], -1)
    return (
        *quantise_fp8_rows_and_columns(grad_TJ.to(gate_up_TJ.dtype), power_of_two_scales),
        *quantise_fp8_columns((silu_TI * up_TI).to(gate_up_TJ.dtype), power_of_two_scales),
    )
