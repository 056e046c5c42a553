"""Tokens into the order of their experts, and back: the order itself, and the two moves with gradients.

`expert_order` sorts the routed copies of all tokens by expert; `permute` writes each token's row at its copies' places;
`unpermute` sums what the experts made of them, with the router's weights. Nothing is read on the host, whatever the
load. With an alignment every expert's rows begin at a multiple of it and the gaps hold zeros, as block-scaled products
need; how many rows there are is then an upper bound that the host knows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, INTEGERS, require, require_device, require_dtype, require_shape

ORDER, PERMUTE, UNPERMUTE = "expert_order", "permute", "unpermute"
dispatch.operator(
    ORDER,
    {
        "reference": f"{__name__}.reference:expert_order",
        "triton": f"{__name__}.sorting:expert_order",
        "torch": f"{__name__}.stable_sort:expert_order",
    },
    elsewhere=("torch", "reference"),
)
for _name in (PERMUTE, UNPERMUTE):
    dispatch.operator(
        _name,
        {
            "reference": f"{__name__}.reference:{_name}",
            "triton": f"{__name__}.moving:{_name}",
            "torch": f"{__name__}.gathers:{_name}",
        },
        elsewhere=("torch", "reference"),
    )


class ExpertOrder(NamedTuple):
    """Where each routed copy lies among R rows in expert order.

    order_R: int32, the copy in each row (copy t·K + k is token t's k-th), -1 in a gap. place_TK: int32, the row of each
    copy. counts_E: int64, copies for each expert. ends_E: int32, where each expert's rows end, its gap included.
    """

    order_R: Tensor
    place_TK: Tensor
    counts_E: Tensor
    ends_E: Tensor


def rows_of(copies: int, experts: int, alignment: int) -> int:
    """Rows that hold `copies` of any load over `experts`, every expert's rounded up to a multiple of `alignment`."""
    return (copies + experts * (alignment - 1)) // alignment * alignment


def expert_order(experts_TK: Tensor, experts: int, alignment: int = 1) -> ExpertOrder:
    """experts_TK [T, K] int64 or int32, in 0 .. experts - 1 (not checked: the host would wait) -> `ExpertOrder`.

    Copies of one expert keep the tokens' order. The number of rows R is T·K for alignment 1 and otherwise the upper
    bound (T·K + experts · (alignment - 1)) rounded down to a multiple of alignment; rows past ends_E[-1] are gaps too.
    """
    require_shape(ORDER, "experts_TK", experts_TK, (None, None), "[T, K]")
    require_dtype(ORDER, "experts_TK", experts_TK, INTEGERS)
    require(experts >= 1, ORDER, "experts", f"is {experts}; expected at least 1")
    require(
        alignment >= 1 and alignment & (alignment - 1) == 0,
        ORDER,
        "alignment",
        f"is {alignment}; expected a power of two",
    )
    require(
        rows_of(experts_TK.numel(), experts, alignment) < 2**31,
        ORDER,
        "experts_TK",
        f"has {experts_TK.numel()} copies; expected fewer than 2^31 rows, because places are int32",
    )
    return ExpertOrder(*dispatch.run(ORDER, experts_TK, experts, alignment))


def permute(x_TD: Tensor, order: ExpertOrder) -> Tensor:
    """x_TD [T, D] -> [R, D]: each token's row at the places of its copies, zeros in the gaps."""
    require_shape(PERMUTE, "x_TD", x_TD, (order.place_TK.shape[0], None), "[T, D]")
    require_dtype(PERMUTE, "x_TD", x_TD, FLOATS)
    require_device(PERMUTE, "order", order.order_R, x_TD.device)
    x_RD: Tensor = dispatch.run(PERMUTE, x_TD, order.order_R, order.place_TK)
    return x_RD


def unpermute(y_RD: Tensor, order: ExpertOrder, weights_TK: Tensor) -> Tensor:
    """y_RD [R, D], weights_TK [T, K] -> [T, D] = Σ_k weights[t, k] · y[place[t, k]], summed in float32, k in order."""
    require_shape(UNPERMUTE, "y_RD", y_RD, (order.order_R.shape[0], None), "[R, D]")
    require_dtype(UNPERMUTE, "y_RD", y_RD, FLOATS)
    require_shape(UNPERMUTE, "weights_TK", weights_TK, tuple(order.place_TK.shape), "[T, K]")
    require_dtype(UNPERMUTE, "weights_TK", weights_TK, FLOATS)
    require_device(UNPERMUTE, "order", order.order_R, y_RD.device)
    require_device(UNPERMUTE, "weights_TK", weights_TK, y_RD.device)
    out_TD: Tensor = dispatch.run(UNPERMUTE, y_RD, order.order_R, order.place_TK, weights_TK)
    return out_TD
