"""Block-scaled FP8 as DeepSeek-V3 publishes its weights, in plain torch. The specification.

Each block of 128 x 128 values shares one scale, `amax / 448`, with amax at least 1e-4; the values are stored as e4m3 of
`x / scale`. The file calls the scale `weight_scale_inv`, and it *multiplies*: x ≈ value · scale. The last block of a
row or column may be partial (kv_a_proj_with_mqa has 576 rows).

With `ue8m0`, as newer checkpoints have it, the scale is rounded up to a power of two, so that scaling is exact.

Sources: DeepSeek-V3 report, section 3.3; the published inference code (weights are multiplied by their scale in
float32) and DeepGEMM's casts (clamp at 1e-4, multiplication by the reciprocal, power of two by the ceiling of log2).

Shapes: N rows, K columns, U = ⌈N / block⌉ and V = ⌈K / block⌉ blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


def _padded_blocks(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., U, rows of a block, V, columns of a block], zeros where the last blocks are partial."""
    rows, columns = x_NK.shape[-2:]
    x_NK = functional.pad(x_NK, (0, -columns % block[1], 0, -rows % block[0]))
    return x_NK.unflatten(-2, (-1, block[0])).unflatten(-1, (-1, block[1]))


def power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below each (positive) value; exact, also where log2 would round."""
    mantissa, exponent = torch.frexp(scale)
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(scale.isfinite(), power, scale)


def quantise_fp8_blocks(
    x_NK: Tensor, block: tuple[int, int] = (128, 128), power_of_two_scales: bool = False, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Values [N, K] in e4m3 and scales [U, V] in float32, of a stack those of each matrix; or their transposes."""
    blocks_UNVK = _padded_blocks(x_NK.float(), block)
    amax_UV = blocks_UNVK.abs().amax((-3, -1)).clamp(min=SMALLEST_AMAX)
    scale_UV = amax_UV / torch.full_like(amax_UV, E4M3_MAX)  # on a GPU, / 448 multiplies by a rounded inverse
    if power_of_two_scales:
        scale_UV = power_of_two_above(scale_UV)
    scaled_UNVK = blocks_UNVK * (1.0 / scale_UV)[..., :, None, :, None]
    rows, columns = x_NK.shape[-2:]
    values_NK = scaled_UNVK.flatten(-2).flatten(-3, -2)[..., :rows, :columns].to(torch.float8_e4m3fn)
    if transposed:
        values_NK, scale_UV = values_NK.transpose(-2, -1), scale_UV.transpose(-2, -1)
    return values_NK.contiguous(), scale_UV.contiguous()


def dequantise_fp8_blocks(
    values_NK: Tensor, scale_UV: Tensor, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """value · scale, multiplied in float32 and rounded once to `dtype`."""
    blocks_UNVK = _padded_blocks(values_NK.float(), block)
    x_UNVK = blocks_UNVK * scale_UV.float()[:, None, :, None]
    return x_UNVK.flatten(2).flatten(0, 1)[: values_NK.shape[0], : values_NK.shape[1]].to(dtype).contiguous()
