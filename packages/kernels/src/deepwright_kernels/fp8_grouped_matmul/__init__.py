"""A block-scaled FP8 product for each group of rows (the experts of a mixture). No gradients: fp8_linear has them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import require_device
from ..fp8_layout import PRODUCTS, ragged_output, require_block_scales, require_ends, require_row_scales, require_values

NAME = "fp8_grouped_matmul"


def _why_not_hopper(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> str | None:
    return ragged_output(b_ENK.shape[1], dtype)


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:{NAME}",
        "triton": f"{__name__}.triton:{NAME}",
        "cuda": "deepwright_kernels.fp8_matmul.hopper:fp8_grouped_matmul",
    },
    cuda=("cuda", "triton", "reference"),
    needs={"cuda": _why_not_hopper},
)


def fp8_grouped_matmul(
    a_TK: Tensor,
    a_scale_TV: Tensor,
    b_ENK: Tensor,
    b_scale_EUV: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a_TK [T, K] in group order and b_ENK [E, N, K], both e4m3 -> [T, N] in `dtype` (bfloat16 or float32).

    Row t of group e becomes a_t · b_eᵀ. Group e is the rows ends[e-1] .. ends[e] of ends_E [E] int32; it may be empty.
    Every end must be a multiple of 128 (the permutation pads groups with rows of zeros), and they must not decrease
    or go past T; neither is checked, because it would make the host wait for the device. T may be larger than the last
    end: rows after it become zero. a_scale_TV: row scales [T, ⌈K/128⌉]; b_scale_EUV: block scales
    [E, ⌈N/128⌉, ⌈K/128⌉]. Sums as in `fp8_matmul`.
    """
    require_values(NAME, "a_TK", a_TK, (None, None), "[T, K]")
    require_row_scales(NAME, "a_scale_TV", a_scale_TV, a_TK)
    require_values(NAME, "b_ENK", b_ENK, (None, None, a_TK.shape[1]), "[E, N, K]")
    require_device(NAME, "b_ENK", b_ENK, a_TK.device)
    require_block_scales(NAME, "b_scale_EUV", b_scale_EUV, b_ENK)
    require_ends(NAME, ends_E, b_ENK.shape[0], a_TK.device)
    if dtype not in PRODUCTS:
        raise TypeError(f"{NAME}: dtype is {dtype}; expected torch.bfloat16 or torch.float32.")
    y_TN: Tensor = dispatch.run(NAME, a_TK, a_scale_TV, b_ENK, b_scale_EUV, ends_E, dtype)
    return y_TN
