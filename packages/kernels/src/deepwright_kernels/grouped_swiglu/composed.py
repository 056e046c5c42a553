"""The same in steps: the operators that permute and multiply, then torch's silu and product.

The permuted rows and both projections pass through memory in between, and rows past the last end take part in silu
and product.

Shapes: T tokens, K copies of each, D hidden, E experts, I expert width, R rows in expert order.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .. import dispatch


def grouped_swiglu(x_TD: Tensor, gate_up_EID: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor) -> Tensor:
    """silu(x · gateᵀ) · (x · upᵀ) of each row's own expert."""
    x_RD = dispatch.run("permute", x_TD, order_R, place_TK)
    gate_RI, up_RI = dispatch.run("grouped_linear", x_RD, gate_up_EID, ends_E).chunk(2, -1)
    return functional.silu(gate_RI) * up_RI
