"""Linear layers whose three products, forward, dgrad and wgrad, are block-scaled FP8, with gradients.

As DeepSeek-V3 trains (report, section 3.3): activations and gradients are quantised in blocks of 1 x 128, weights in
blocks of 128 x 128. Between the passes the input is kept quantised along its tokens, one byte a value, which is what
the gradient of the weight needs; the weight is quantised again in the backward pass, transposed.

Made of the FP8 operators, which have the backends; these functions have none of their own.

Shapes: T tokens, K inputs, N outputs, E groups.
"""

from __future__ import annotations

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


def product_with_weight(
    values_TK: Tensor,
    scale_TV: Tensor,
    weight: Tensor,
    ends_E: Tensor | None,
    dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor:
    """x · weightᵀ, or x · weight if `transposed`: of one weight, or of each group's if there are groups.

    In bfloat16 where that is `dtype`, else rounded to it from float32.
    """
    weight8, weight_scale = quantise_fp8_blocks(weight, transposed=transposed)
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if ends_E is None:
        y_TN = fp8_matmul(values_TK, scale_TV, weight8, weight_scale, wide)
    else:
        y_TN = fp8_grouped_matmul(values_TK, scale_TV, weight8, weight_scale, ends_E, wide)
    # Not a conversion to the same dtype: as the last step of a forward pass it makes torch.compile of torch 2.11 lose
    # the gradients.
    return y_TN if wide == dtype else y_TN.to(dtype)


def gradient_of_weight(
    grad_NT: Tensor, grad_scale_NU: Tensor, x_KT: Tensor, x_scale_KU: Tensor, ends_E: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Σ over tokens of the output's gradient times the input: [N, K], or [E, N, K] where there are groups."""
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if ends_E is None:
        grad = fp8_matmul(grad_NT, grad_scale_NU, x_KT, x_scale_KU, wide)
    else:
        grad = fp8_grouped_outer(grad_NT, grad_scale_NU, x_KT, x_scale_KU, ends_E, wide)
    return grad if wide == dtype else grad.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight: Tensor, ends_E: Tensor | None, trains_weight: bool) -> Tensor:
        ctx.x_dtype = x_TK.dtype
        if trains_weight:
            x8_TK, x_scale_TV, *columns = quantise_fp8_rows_and_columns(x_TK)
        else:
            x8_TK, x_scale_TV, *columns = quantise_fp8_rows(x_TK)
        ctx.save_for_backward(weight, ends_E, *columns)
        return product_with_weight(x8_TK, x_scale_TV, weight, ends_E, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, ends_E, *x_columns = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        grad_x = grad_weight = None
        rows: tuple[Tensor, ...] = ()
        columns: tuple[Tensor, ...] = ()
        if for_x and for_weight:
            both = quantise_fp8_rows_and_columns(grad_TN)
            rows, columns = both[:2], both[2:]
        elif for_x:
            rows = quantise_fp8_rows(grad_TN)
        elif for_weight:
            columns = quantise_fp8_columns(grad_TN)
        if for_x:
            values_TN, scale_TV = rows
            grad_x = product_with_weight(values_TN, scale_TV, weight, ends_E, ctx.x_dtype, transposed=True)
        if for_weight:
            values_NT, scale_NU = columns
            x_KT, x_scale_KU = x_columns
            grad_weight = gradient_of_weight(values_NT, scale_NU, x_KT, x_scale_KU, ends_E, weight.dtype)
        return grad_x, grad_weight, None, None


def require_weight(operator: str, argument: str, weight: Tensor, x_TK: Tensor, meaning: str) -> None:
    """Refuse a weight whose dtype, place or sizes FP8 products cannot take; its shape has been looked at before."""
    require_dtype(operator, "x_TK", x_TK, FLOATS)
    require_dtype(operator, argument, weight, FLOATS)
    require_device(operator, argument, weight, x_TK.device)
    require(
        all(size % ROW_BYTES == 0 for size in weight.shape[-2:]),
        operator,
        argument,
        f"has shape {shape_of(weight)}; expected {meaning} with the last two sizes multiples of {ROW_BYTES}, because "
        f"rows of FP8 values have to begin at multiples of {ROW_BYTES} bytes",
    )


def fp8_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x_TK [..., K] and weight_NK [N, K] in any float dtype -> x · weightᵀ [..., N] in bfloat16.

    N and K have to be multiples of 16. Gradients come in the dtypes of x and weight, computed in FP8 as well.
    """
    require(x_TK.ndim >= 1, LINEAR, "x_TK", "is a single number; expected [..., K]")
    require_shape(LINEAR, "weight_NK", weight_NK, (None, x_TK.shape[-1]), "[N, K]")
    require_weight(LINEAR, "weight_NK", weight_NK, x_TK, "[N, K]")
    trains_weight = weight_NK.requires_grad and torch.is_grad_enabled()
    y_TN = _Linear.apply(x_TK.reshape(-1, x_TK.shape[-1]), weight_NK, None, trains_weight)
    return y_TN.view(*x_TK.shape[:-1], weight_NK.shape[0])


def fp8_grouped_linear(x_TK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """x_TK [T, K] in group order, weight_ENK [E, N, K], both in any float dtype -> y_TN [T, N] in bfloat16.

    Group e is the rows ends[e-1] .. ends[e] of ends_E [E] int32, all of them multiples of 128 and at most T (not
    checked: the host would wait). Rows after the last end become zero and get no gradient. N and K have to be
    multiples of 16. Gradients come in the dtypes of x and weight.
    """
    require_shape(GROUPED, "x_TK", x_TK, (None, None), "[T, K]")
    require_shape(GROUPED, "weight_ENK", weight_ENK, (None, None, x_TK.shape[1]), "[E, N, K]")
    require_weight(GROUPED, "weight_ENK", weight_ENK, x_TK, "[E, N, K]")
    require_ends(GROUPED, ends_E, weight_ENK.shape[0], x_TK.device)
    trains_weight = weight_ENK.requires_grad and torch.is_grad_enabled()
    y_TN: Tensor = _Linear.apply(x_TK, weight_ENK, ends_E, trains_weight)
    return y_TN
