"""The product of block-scaled FP8 matrices by torch's own `scaled_mm`, which asks cuBLASLt (Hopper, CUDA 12.9).

It wants block scales transposed and their blocks of K padded to a multiple of 4, and row scales without room between
the blocks of K, so numbers of rows that are multiples of 4.

Shapes: M and N rows of the operands, K what is summed over, U = ⌈N/128⌉ and V = ⌈K/128⌉ blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType

from ..fp8_layout import SCALES_MULTIPLE


@torch.library.custom_op("deepwright::fp8_matmul_scaled_mm", mutates_args=())
def _product(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _multiply(a_MK, a_scale_MV, b_NK, b_scale, dtype)


@_product.register_fake
def _(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype, device=a_MK.device)


def _multiply(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    recipe = ScalingType.BlockWise1x128
    if b_scale.shape[0] != b_NK.shape[0]:
        recipe = ScalingType.BlockWise128x128
        missing = -b_scale.shape[1] % SCALES_MULTIPLE
        b_scale = (functional.pad(b_scale, (0, missing)) if missing else b_scale).t()
    return functional.scaled_mm(
        a_MK, b_NK.t(), a_scale_MV, ScalingType.BlockWise1x128, b_scale, recipe, output_dtype=dtype
    )


def fp8_matmul(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a · bᵀ, rounded once to `dtype`. b_scale: a row for each row of b, or for each 128 of them."""
    # Opaque to torch.compile; outside of a graph torch's dispatch would only take the host's time.
    return (_product if torch.compiler.is_compiling() else _multiply)(a_MK, a_scale_MV, b_NK, b_scale, dtype)
