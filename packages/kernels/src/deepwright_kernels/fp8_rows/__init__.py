"""Activations to e4m3 with a scale for each 128 values of a row, or of a column, or both. No gradients.

Forward and dgrad products sum over a row of the activations, wgrad over their tokens: so the same matrix is wanted
quantised along its rows and, transposed, along its columns. Both at once read it once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require_dtype, require_shape

ROWS, COLUMNS, BOTH = "quantise_fp8_rows", "quantise_fp8_columns", "quantise_fp8_rows_and_columns"


def _why_not_hopper(x_TK: Tensor, *_: bool) -> str | None:
    if x_TK.dtype != torch.bfloat16:
        return "its kernel is for bfloat16"
    return "its kernel is for numbers of columns that are multiples of 8" if x_TK.shape[-1] % 8 else None


def _fastest_on_cuda(x_TK: Tensor, *_: bool) -> tuple[str, ...]:
    return ("triton", "reference") if _why_not_hopper(x_TK) else ("cuda", "triton", "reference")


dispatch.operator(ROWS, {"reference": f"{__name__}.reference:{ROWS}", "triton": f"{__name__}.triton:{ROWS}"})
for name in (COLUMNS, BOTH):
    dispatch.operator(
        name,
        {
            "reference": f"{__name__}.reference:{name}",
            "triton": f"{__name__}.triton:{name}",
            "cuda": f"{__name__}.hopper:{name}",
        },
        cuda=_fastest_on_cuda,
        needs={"cuda": _why_not_hopper},
    )


def _require(operator: str, x_TK: Tensor) -> None:
    require_shape(operator, "x_TK", x_TK, (None, None), "[T, K]")
    require_dtype(operator, "x_TK", x_TK, FLOATS)


def quantise_fp8_rows(x_TK: Tensor, power_of_two_scales: bool = False) -> tuple[Tensor, Tensor]:
    """x_TK [T, K] -> e4m3 values [T, K] and float32 row scales [T, ⌈K/128⌉], which multiply.

    scale = amax / 448 over 128 values of a row (DeepSeek-V3 report, section 3.3.2), amax at least 1e-4; the last block
    of a row may be partial. power_of_two_scales: round scales up to powers of two ("ue8m0"). NaN and infinities give
    NaN. Rows of the values begin at multiples of 16 bytes; the scales lie token by token (fp8_layout.py).
    """
    _require(ROWS, x_TK)
    values_TK, scale_TV = dispatch.run(ROWS, x_TK, power_of_two_scales)
    return values_TK, scale_TV


def quantise_fp8_columns(x_TK: Tensor, power_of_two_scales: bool = False) -> tuple[Tensor, Tensor]:
    """x_TK [T, K] -> its transpose as e4m3 values [K, T] and row scales [K, ⌈T/128⌉]: a scale for 128 tokens.

    What `quantise_fp8_rows` gives for x_TK.T, without transposing x_TK first.
    """
    _require(COLUMNS, x_TK)
    values_KT, scale_KU = dispatch.run(COLUMNS, x_TK, power_of_two_scales)
    return values_KT, scale_KU


def quantise_fp8_rows_and_columns(
    x_TK: Tensor, power_of_two_scales: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [T, K] and scales [T, ⌈K/128⌉] of the rows, then values [K, T] and scales [K, ⌈T/128⌉] of the columns."""
    _require(BOTH, x_TK)
    values_TK, scale_TV, values_KT, scale_KU = dispatch.run(BOTH, x_TK, power_of_two_scales)
    return values_TK, scale_TV, values_KT, scale_KU
