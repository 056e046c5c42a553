"""A linear layer for each group of rows (the experts of a mixture), with gradients for rows and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, in_autocast_dtype, require_device, require_dtype, require_shape

NAME = "grouped_linear"
# What a kernel's tiles take of a processor's shared memory is there on data centre GPUs from Hopper on.
GENERATIONS = (9, 10)
MULTIPLE = 8
# Few large groups leave nothing to win over torch's product, which by the run is level or ahead of the tiles there.
LARGE_GROUP, FEW_GROUPS = 2048, 16


def why_not_tiles(x_TK: Tensor, weight_ENK: Tensor, *_: object) -> str | None:
    """Why the Triton kernels cannot multiply these, or None."""
    if x_TK.device.type != "cuda":
        return None
    if torch.version.hip is not None or dispatch.capability(x_TK.device.index or 0)[0] not in GENERATIONS:
        return "its tiles need the shared memory of a Hopper or Blackwell GPU (compute capability 9 or 10)"
    if x_TK.dtype not in (torch.bfloat16, torch.float16):
        return "it multiplies 16-bit numbers and the tensors are float32"
    if x_TK.shape[1] % MULTIPLE or weight_ENK.shape[1] % MULTIPLE:
        return f"rows must begin at multiples of 16 bytes: the sizes have to be multiples of {MULTIPLE}"
    return None


def _order(x_TK: Tensor, weight_ENK: Tensor | None = None, *_: object) -> tuple[str, ...]:
    if weight_ENK is None:
        return "triton", "torch", "reference"
    groups = weight_ENK.shape[0]
    # torch multiplies other dtypes in a loop that waits for the host.
    large = x_TK.dtype == torch.bfloat16 and groups <= FEW_GROUPS and x_TK.shape[0] >= LARGE_GROUP * groups
    if large or why_not_tiles(x_TK, weight_ENK) is not None:
        return "torch", "reference"
    return "triton", "torch", "reference"


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:grouped_linear",
        "triton": f"{__name__}.triton:grouped_linear",
        "torch": f"{__name__}.grouped_mm:grouped_linear",
    },
    cuda=_order,
    elsewhere=("torch", "reference"),
    needs={"triton": why_not_tiles},
)


def grouped_linear(x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """x_TK [T, K] in group order, weight_ENK [E, N, K], offsets_E [E] int32 ends of the groups -> y_TN [T, N].

    Group e is the rows offsets[e-1] .. offsets[e]; it may be empty. Nothing is checked about the offsets' values,
    because that would make the host wait for the device. Rows past the last offset may hold anything.
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
