"""Block-scaled FP8 weights: to e4m3 with a scale for each block, and back. No gradients: this is a storage format."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, require_shape
from ..fp8_layout import BLOCK

QUANTISE, DEQUANTISE = "quantise_fp8_blocks", "dequantise_fp8_blocks"
KERNEL_BLOCK = (BLOCK, BLOCK)


def _fastest_on_cuda(x_NK: Tensor, block: tuple[int, int] = KERNEL_BLOCK, *_: bool) -> tuple[str, ...]:
    return ("triton", "reference") if tuple(block) == KERNEL_BLOCK else ("reference",)


def _triton_needs(x_NK: Tensor, block: tuple[int, int], *_: bool) -> str | None:
    return None if tuple(block) == KERNEL_BLOCK else f"its kernel is for blocks of 128 x 128 and the block is {block}"


dispatch.operator(
    QUANTISE,
    {"reference": f"{__name__}.reference:{QUANTISE}", "triton": f"{__name__}.triton:{QUANTISE}"},
    cuda=_fastest_on_cuda,
    needs={"triton": _triton_needs},
)
dispatch.operator(DEQUANTISE, {"reference": f"{__name__}.reference:{DEQUANTISE}"}, cuda=("reference",))

SCALES = (torch.float32, torch.float8_e8m0fnu)


def _require_block(operator: str, block: tuple[int, int]) -> None:
    require(len(block) == 2 and min(block) >= 1, operator, "block", f"is {block}; expected two positive sizes")


def quantise_fp8_blocks(
    x_NK: Tensor, block: tuple[int, int] = (128, 128), power_of_two_scales: bool = False, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """x_NK [N, K] -> e4m3 values [N, K] and float32 scales [⌈N/128⌉, ⌈K/128⌉] that multiply.

    x_NK may be a stack [E, N, K], of which each matrix is quantised for itself.
    power_of_two_scales: round scales up to powers of two ("ue8m0"). Infinities and NaN give NaN.
    transposed: give the transposes, values [K, N] and scales [⌈K/128⌉, ⌈N/128⌉], as the product for the gradient of
    a layer's input wants its weight.
    """
    sizes = (None, None, None) if x_NK.ndim == 3 else (None, None)
    require_shape(QUANTISE, "x_NK", x_NK, sizes, "[N, K] or a stack [E, N, K]")
    require_dtype(QUANTISE, "x_NK", x_NK, FLOATS)
    _require_block(QUANTISE, block)
    values_NK, scale_UV = dispatch.run(QUANTISE, x_NK, block, power_of_two_scales, transposed)
    return values_NK, scale_UV


def dequantise_fp8_blocks(
    values_NK: Tensor, scale_UV: Tensor, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """e4m3 values [N, K] times their blocks' scales [⌈N/128⌉, ⌈K/128⌉] (float32 or e8m0) -> [N, K] in `dtype`."""
    require_shape(DEQUANTISE, "values_NK", values_NK, (None, None), "[N, K]")
    require_dtype(DEQUANTISE, "values_NK", values_NK, (torch.float8_e4m3fn,))
    _require_block(DEQUANTISE, block)
    blocks = tuple(-(-size // each) for size, each in zip(values_NK.shape, block, strict=True))
    require_shape(DEQUANTISE, "scale_UV", scale_UV, blocks, "[⌈N/block⌉, ⌈K/block⌉]")
    require_dtype(DEQUANTISE, "scale_UV", scale_UV, SCALES)
    require_device(DEQUANTISE, "scale_UV", scale_UV, values_NK.device)
    x_NK: Tensor = dispatch.run(DEQUANTISE, values_NK, scale_UV, block, dtype)
    return x_NK
