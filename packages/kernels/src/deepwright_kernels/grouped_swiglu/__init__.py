"""The first half of a mixture's experts: rows in expert order, the gate's and the up projection, SwiGLU."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, in_autocast_dtype, require, require_device, require_dtype, require_shape
from ..grouped_linear import why_not_tiles
from ..token_permutation import ExpertOrder

NAME = "grouped_swiglu"


def _order(x_TD: Tensor, gate_up_EID: Tensor | None = None, *_: object) -> tuple[str, ...]:
    if gate_up_EID is None or why_not_tiles(x_TD, gate_up_EID) is None:
        return "triton", "torch", "reference"
    return "torch", "reference"


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:grouped_swiglu",
        "triton": f"{__name__}.triton:grouped_swiglu",
        "torch": f"{__name__}.composed:grouped_swiglu",
    },
    cuda=_order,
    elsewhere=("torch", "reference"),
    needs={"triton": why_not_tiles},
)


def grouped_swiglu(x_TD: Tensor, gate_up_EID: Tensor, order: ExpertOrder) -> Tensor:
    """x_TD [T, D], gate_up_EID [E, 2·I, D], gate first -> h_RI [R, I] in expert order, with gradients for both.

    h = silu(x · gateᵀ) · (x · upᵀ) with the weights of the expert that the row belongs to; zeros in an expert's gap.
    Rows past the last expert's end may hold anything.
    """
    x_TD, gate_up_EID = in_autocast_dtype(x_TD, gate_up_EID)
    require_shape(NAME, "x_TD", x_TD, (order.place_TK.shape[0], None), "[T, D]")
    require_dtype(NAME, "x_TD", x_TD, FLOATS)
    require_shape(NAME, "gate_up_EID", gate_up_EID, (order.ends_E.shape[0], None, x_TD.shape[1]), "[E, 2·I, D]")
    require(
        gate_up_EID.shape[1] % 2 == 0,
        NAME,
        "gate_up_EID",
        f"has {gate_up_EID.shape[1]} rows for each expert; expected an even number, gate and up",
    )
    require_dtype(NAME, "gate_up_EID", gate_up_EID, (x_TD.dtype,))
    require_device(NAME, "gate_up_EID", gate_up_EID, x_TD.device)
    require_device(NAME, "order", order.order_R, x_TD.device)
    h_RI: Tensor = dispatch.run(NAME, x_TD, gate_up_EID, order.order_R, order.place_TK, order.ends_E)
    return h_RI
