"""Rows in expert order, two projections and SwiGLU (Shazeer 2020), in plain torch, expert by expert. The specification.

The loop reads the ends on the host, so on a GPU it makes the host wait.

Shapes: T tokens, K copies of each, D hidden, E experts, I expert width, R rows in expert order.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..grouped_linear.reference import grouped_linear
from ..token_permutation.reference import permute


def grouped_swiglu(x_TD: Tensor, gate_up_EID: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ) of each row's own expert."""
    gate_RI, up_RI = grouped_linear(permute(x_TD, order_R, place_TK), gate_up_EID, ends_E).chunk(2, -1)
    return functional.silu(gate_RI) * up_RI
