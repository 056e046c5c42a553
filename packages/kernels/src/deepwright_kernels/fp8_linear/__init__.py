"""Linear layers whose three products, forward, dgrad and wgrad, are block-scaled FP8, with gradients.

As DeepSeek-V3 trains (report, section 3.3): activations and gradients are quantised in blocks of 1 x 128, weights in
blocks of 128 x 128. Between the passes the input is kept quantised along its tokens, one byte a value, which is what
the gradient of the weight needs; the weight is quantised again in the backward pass, transposed.

Made of the FP8 operators, which have the backends; these functions have none of their own.

Shapes: T tokens, K inputs, N outputs, E groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import FLOATS, require, require_device, require_dtype, require_shape, shape_of
from ..fp8_blocks import quantise_fp8_blocks
from ..fp8_grouped_matmul import fp8_grouped_matmul
from ..fp8_grouped_outer import fp8_grouped_outer
from ..fp8_layout import ROW_BYTES, require_ends
from ..fp8_matmul import fp8_matmul
from ..fp8_rows import quantise_fp8_columns, quantise_fp8_rows, quantise_fp8_rows_and_columns

LINEAR, GROUPED = "fp8_linear", "fp8_grouped_linear"


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a product is written in that becomes a gradient of this dtype."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, trains_weight: bool) -> Tensor:
        if trains_weight:
            x8_TK, x_scale_TV, x8_KT, x_scale_KU = quantise_fp8_rows_and_columns(x_TK)
            ctx.save_for_backward(weight_NK, x8_KT, x_scale_KU)
        else:
            x8_TK, x_scale_TV = quantise_fp8_rows(x_TK)
            ctx.save_for_backward(weight_NK)
        ctx.x_dtype = x_TK.dtype
        return fp8_matmul(x8_TK, x_scale_TV, *quantise_fp8_blocks(weight_NK))

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_NK, *kept = ctx.saved_tensors

        def dgrad(grad8_TN: Tensor, scale_TV: Tensor) -> Tensor:
            weight8_KN, weight_scale_VU = quantise_fp8_blocks(weight_NK, transposed=True)
            dtype = _product_dtype(ctx.x_dtype)
            return fp8_matmul(grad8_TN, scale_TV, weight8_KN, weight_scale_VU, dtype).to(ctx.x_dtype)

        def wgrad(grad8_NT: Tensor, scale_NU: Tensor) -> Tensor:
            x8_KT, x_scale_KU = kept
            dtype = _product_dtype(weight_NK.dtype)
            return fp8_matmul(grad8_NT, scale_NU, x8_KT, x_scale_KU, dtype).to(weight_NK.dtype)

        return *_gradients(grad_TN, ctx.needs_input_grad, dgrad, wgrad), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_ENK: Tensor, ends_E: Tensor, trains_weight: bool) -> Tensor:
        if trains_weight:
            x8_TK, x_scale_TV, x8_KT, x_scale_KU = quantise_fp8_rows_and_columns(x_TK)
            ctx.save_for_backward(weight_ENK, ends_E, x8_KT, x_scale_KU)
        else:
            x8_TK, x_scale_TV = quantise_fp8_rows(x_TK)
            ctx.save_for_backward(weight_ENK, ends_E)
        ctx.x_dtype = x_TK.dtype
        return fp8_grouped_matmul(x8_TK, x_scale_TV, *quantise_fp8_blocks(weight_ENK), ends_E)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight_ENK, ends_E, *kept = ctx.saved_tensors

        def dgrad(grad8_TN: Tensor, scale_TV: Tensor) -> Tensor:
            weight8_EKN, weight_scale_EVU = quantise_fp8_blocks(weight_ENK, transposed=True)
            dtype = _product_dtype(ctx.x_dtype)
            return fp8_grouped_matmul(grad8_TN, scale_TV, weight8_EKN, weight_scale_EVU, ends_E, dtype).to(ctx.x_dtype)

        def wgrad(grad8_NT: Tensor, scale_NU: Tensor) -> Tensor:
            x8_KT, x_scale_KU = kept
            dtype = _product_dtype(weight_ENK.dtype)
            return fp8_grouped_outer(grad8_NT, scale_NU, x8_KT, x_scale_KU, ends_E, dtype).to(weight_ENK.dtype)

        return *_gradients(grad_TN, ctx.needs_input_grad, dgrad, wgrad), None, None


def _gradients(
    grad_TN: Tensor, wanted: tuple[bool, ...], dgrad: Callable[..., Tensor], wgrad: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight, as far as they are wanted; the output's gradient is read once."""
    for_x, for_weight = wanted[:2]
    if for_x and for_weight:
        grad8_TN, scale_TV, grad8_NT, scale_NU = quantise_fp8_rows_and_columns(grad_TN)
        return dgrad(grad8_TN, scale_TV), wgrad(grad8_NT, scale_NU)
    if for_x:
        return dgrad(*quantise_fp8_rows(grad_TN)), None
    if for_weight:
        return None, wgrad(*quantise_fp8_columns(grad_TN))
    return None, None


def _require(operator: str, x_TK: Tensor, weight: Tensor, meaning: str) -> None:
    require_dtype(operator, "x_TK", x_TK, FLOATS)
    require_dtype(operator, "weight", weight, FLOATS)
    require_device(operator, "weight", weight, x_TK.device)
    require(
        all(size % ROW_BYTES == 0 for size in weight.shape[-2:]),
        operator,
        "weight",
        f"has shape {shape_of(weight)}; expected {meaning} with N and K multiples of {ROW_BYTES}, because rows of FP8 "
        f"values have to begin at multiples of {ROW_BYTES} bytes",
    )


def fp8_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x_TK [..., K] and weight_NK [N, K] in any float dtype -> x · weightᵀ [..., N] in bfloat16.

    N and K have to be multiples of 16. Gradients come in the dtypes of x and weight, computed in FP8 as well.
    """
    require(x_TK.ndim >= 1, LINEAR, "x_TK", "is a single number; expected [..., K]")
    require_shape(LINEAR, "weight_NK", weight_NK, (None, x_TK.shape[-1]), "[N, K]")
    _require(LINEAR, x_TK, weight_NK, "[N, K]")
    trains_weight = weight_NK.requires_grad and torch.is_grad_enabled()
    y_TN = _Linear.apply(x_TK.reshape(-1, x_TK.shape[-1]), weight_NK, trains_weight)
    return y_TN.view(*x_TK.shape[:-1], weight_NK.shape[0])


def fp8_grouped_linear(x_TK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """x_TK [T, K] in group order, weight_ENK [E, N, K], both in any float dtype -> y_TN [T, N] in bfloat16.

    Group e is the rows ends[e-1] .. ends[e] of ends_E [E] int32, all of them multiples of 128 and at most T (not
    checked: the host would wait). Rows after the last end become zero and get no gradient. N and K have to be
    multiples of 16. Gradients come in the dtypes of x and weight.
    """
    require_shape(GROUPED, "x_TK", x_TK, (None, None), "[T, K]")
    require_shape(GROUPED, "weight_ENK", weight_ENK, (None, None, x_TK.shape[1]), "[E, N, K]")
    _require(GROUPED, x_TK, weight_ENK, "[E, N, K]")
    require_ends(GROUPED, ends_E, weight_ENK.shape[0], x_TK.device)
    trains_weight = weight_ENK.requires_grad and torch.is_grad_enabled()
    y_TN: Tensor = _GroupedLinear.apply(x_TK, weight_ENK, ends_E, trains_weight)
    return y_TN
