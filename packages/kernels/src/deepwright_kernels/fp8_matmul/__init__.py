"""The product of two block-scaled FP8 matrices, a · bᵀ. No gradients: fp8_linear makes a layer of three of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import require_device, shape_of
from ..constant_result import constant_result
from ..fp8_layout import (
    PRODUCTS,
    ROW_BYTES,
    SCALES_MULTIPLE,
    blocks,
    ragged_output,
    require_block_scales,
    require_row_scales,
    require_values,
)

NAME = "fp8_matmul"
LEAST_FOR_TORCH = 512  # four blocks of scales, which is what it counts them in
LARGE_RESULT, LONG_SUM = 2**24, 8192


def _why_not_hopper(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> str | None:
    return ragged_output(b_NK.shape[0], dtype)


@constant_result
def _has_scaled_mm(index: int) -> bool:
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return torch.version.hip is None and cuda >= (12, 9) and dispatch.capability(index) == (9, 0)


def _why_not_torch(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> str | None:
    if a_MK.device.type != "cuda" or not _has_scaled_mm(a_MK.device.index or 0):
        return "torch has products with scales for blocks on Hopper GPUs only, with CUDA 12.9"
    if a_MK.shape[1] < LEAST_FOR_TORCH or not (a_MK.numel() and b_NK.numel()):
        return f"torch's scaled_mm is only taken where at least {LEAST_FOR_TORCH} values are summed"
    (rows, inner), outputs = a_MK.shape, b_NK.shape[0]
    if not (a_MK.is_contiguous() and b_NK.is_contiguous()) or inner % ROW_BYTES or outputs % ROW_BYTES:
        return f"torch's scaled_mm wants contiguous operands whose sizes are multiples of {ROW_BYTES}"
    row_scales = [(a_scale_MV, rows), (b_scale, outputs)][: 1 + (b_scale.shape[0] == outputs)]
    if any(count % SCALES_MULTIPLE or scale.stride(1) != count for scale, count in row_scales):
        return f"torch's scaled_mm wants row scales without gaps, of rows that are a multiple of {SCALES_MULTIPLE}"
    return None


def _fastest_on_cuda(a_MK: Tensor, *others: Any) -> tuple[str, ...]:
    ours = ("cuda", "triton", "reference")
    if not others or _why_not_torch(a_MK, *others) is not None:
        return ours
    _, b_NK, b_scale, _ = others
    (rows, inner), outputs = a_MK.shape, b_NK.shape[0]
    # Measured on an H200: torch is ahead where b has row scales (wgrad), where tiles are few, where sums are very long.
    large = b_scale.shape[0] != outputs and rows * outputs >= LARGE_RESULT and inner <= LONG_SUM
    return (ours[0], "torch", *ours[1:]) if large else ("torch", *ours)


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:{NAME}",
        "triton": f"{__name__}.triton:{NAME}",
        "cuda": f"{__name__}.hopper:{NAME}",
        "torch": f"{__name__}.scaled_mm:{NAME}",
    },
    cuda=_fastest_on_cuda,
    needs={"cuda": _why_not_hopper, "torch": _why_not_torch},
)


def fp8_matmul(
    a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a_MK [M, K] and b_NK [N, K], both e4m3 -> a · bᵀ [M, N] in `dtype` (bfloat16 or float32).

    a_scale_MV: row scales [M, ⌈K/128⌉]. b_scale: block scales [⌈N/128⌉, ⌈K/128⌉] (a weight: forward and dgrad) or row
    scales [N, ⌈K/128⌉] (wgrad). The product of each 128 of K is scaled and added up in float32 (DeepSeek-V3 report,
    section 3.3.2). fp8_layout.py says how the operands lie in memory.
    """
    require_values(NAME, "a_MK", a_MK, (None, None), "[M, K]")
    require_values(NAME, "b_NK", b_NK, (None, a_MK.shape[1]), "[N, K]")
    require_device(NAME, "b_NK", b_NK, a_MK.device)
    require_row_scales(NAME, "a_scale_MV", a_scale_MV, a_MK)
    outputs, inner = b_NK.shape
    if b_scale.ndim == 2 and b_scale.shape[0] == blocks(outputs) and outputs > 1:
        require_block_scales(NAME, "b_scale", b_scale, b_NK)
    elif b_scale.ndim == 2 and b_scale.shape[0] == outputs:
        require_row_scales(NAME, "b_scale", b_scale, b_NK)
    else:
        raise ValueError(
            f"{NAME}: b_scale has shape {shape_of(b_scale)}; expected block scales [⌈N/128⌉, ⌈K/128⌉] = "
            f"[{blocks(outputs)}, {blocks(inner)}] or row scales [N, ⌈K/128⌉] = [{outputs}, {blocks(inner)}]."
        )
    if dtype not in PRODUCTS:
        raise TypeError(f"{NAME}: dtype is {dtype}; expected torch.bfloat16 or torch.float32.")
    y_MN: Tensor = dispatch.run(NAME, a_MK, a_scale_MV, b_NK, b_scale, dtype)
    return y_MN
