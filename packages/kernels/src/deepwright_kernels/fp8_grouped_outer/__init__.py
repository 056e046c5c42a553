"""For each group of tokens, a block-scaled FP8 product summed over them: the gradients of the experts' weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import require_device
from ..fp8_layout import PRODUCTS, ragged_output, require_ends, require_row_scales, require_values

NAME = "fp8_grouped_outer"


def _why_not_hopper(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> str | None:
    return ragged_output(b_NT.shape[0], dtype)


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:{NAME}",
        "triton": f"{__name__}.triton:{NAME}",
        "cuda": "deepwright_kernels.fp8_matmul.hopper:fp8_grouped_outer",
    },
    cuda=("cuda", "triton", "reference"),
    needs={"cuda": _why_not_hopper},
)


def fp8_grouped_outer(
    a_MT: Tensor,
    a_scale_MV: Tensor,
    b_NT: Tensor,
    b_scale_NV: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a_MT [M, T] and b_NT [N, T], both e4m3 with tokens in group order -> [E, M, N] in `dtype` (bfloat16 or float32).

    y_e = Σ_t a_t b_tᵀ over the tokens of group e, which are the columns ends[e-1] .. ends[e] of ends_E [E] int32; an
    empty group gives zeros. Every end must be a multiple of 128, and they must not decrease or go past T; neither is
    checked. Columns after the last end are not read. a_scale_MV, b_scale_NV: row scales [M, ⌈T/128⌉], [N, ⌈T/128⌉], as
    `quantise_fp8_columns` gives them. Sums as in `fp8_matmul`.
    """
    require_values(NAME, "a_MT", a_MT, (None, None), "[M, T]")
    require_row_scales(NAME, "a_scale_MV", a_scale_MV, a_MT)
    require_values(NAME, "b_NT", b_NT, (None, a_MT.shape[1]), "[N, T]")
    require_device(NAME, "b_NT", b_NT, a_MT.device)
    require_row_scales(NAME, "b_scale_NV", b_scale_NV, b_NT)
    require_ends(NAME, ends_E, None, a_MT.device)
    if dtype not in PRODUCTS:
        raise TypeError(f"{NAME}: dtype is {dtype}; expected torch.bfloat16 or torch.float32.")
    y_EMN: Tensor = dispatch.run(NAME, a_MT, a_scale_MV, b_NT, b_scale_NV, ends_E, dtype)
    return y_EMN
