"""A linear layer for each group of rows (the experts of a mixture), with gradients for rows and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, in_autocast_dtype, require_device, require_dtype, require_shape

NAME = "grouped_linear"
dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:grouped_linear",
        "torch": f"{__name__}.grouped_mm:grouped_linear",
    },
    cuda=("torch", "reference"),
    elsewhere=("torch", "reference"),
)


def grouped_linear(x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """x_TK [T, K] in group order, weight_ENK [E, N, K], offsets_E [E] int32 ends of the groups -> y_TN [T, N].

    Group e is the rows offsets[e-1] .. offsets[e]; it may be empty. The last offset must be T: it is not checked,
    because that would make the host wait for the device.
    """
    x_TK, weight_ENK = in_autocast_dtype(x_TK, weight_ENK)
    require_shape(NAME, "x_TK", x_TK, (None, None), "[T, K]")
    require_dtype(NAME, "x_TK", x_TK, FLOATS)
    require_shape(NAME, "weight_ENK", weight_ENK, (None, None, x_TK.shape[1]), "[E, N, K]")
    require_dtype(NAME, "weight_ENK", weight_ENK, (x_TK.dtype,))
    require_shape(NAME, "offsets_E", offsets_E, (weight_ENK.shape[0],), "[E]")
    require_dtype(NAME, "offsets_E", offsets_E, (torch.int32,))
    require_device(NAME, "weight_ENK", weight_ENK, x_TK.device)
    require_device(NAME, "offsets_E", offsets_E, x_TK.device)
    y_TN: Tensor = dispatch.run(NAME, x_TK, weight_ENK, offsets_E)
    return y_TN
