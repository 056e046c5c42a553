"""Gated feed-forwards in block-scaled FP8, down(silu(gate x) · up x), with gradients: of one, or of each expert's.

What two linear layers and SwiGLU would do, with what is between them kept in FP8: neither the hidden values nor the
gradient of gate and up are ever written in bf16, and the hidden values are computed again in the backward pass. Kept
between the passes: gate and up in bf16, and the input quantised along its tokens.

Made of the FP8 operators, which have the backends; these functions have none of their own.

Shapes: T tokens, K inputs, I hidden size, J = 2 I gates and ups, N outputs, E groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import require, require_shape
from ..fp8_layout import require_ends
from ..fp8_linear import gradient_of_weight, product_with_weight, require_weight
from ..fp8_rows import quantise_fp8_rows, quantise_fp8_rows_and_columns
from ..fp8_swiglu import swiglu_backward_quantise_fp8, swiglu_quantise_fp8

DENSE, GROUPED = "fp8_feed_forward", "fp8_grouped_feed_forward"


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor | None, trains: bool) -> Tensor:
        ctx.x_dtype = x_TK.dtype
        if trains:
            x8_TK, x_scale_TV, *x_columns = quantise_fp8_rows_and_columns(x_TK)
        else:
            x8_TK, x_scale_TV, *x_columns = quantise_fp8_rows(x_TK)
        gate_up_TJ = product_with_weight(x8_TK, x_scale_TV, gate_up, ends_E, torch.bfloat16)
        ctx.save_for_backward(gate_up, down, ends_E, gate_up_TJ, *x_columns)
        hidden_TI, hidden_scale_TV = swiglu_quantise_fp8(gate_up_TJ)
        return product_with_weight(hidden_TI, hidden_scale_TV, down, ends_E, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        gate_up, down, ends_E, gate_up_TJ, *x_columns = ctx.saved_tensors
        for_x, for_gate_up, for_down = ctx.needs_input_grad[:3]
        grad_x = grad_gate_up = grad_down = None
        grad8_TN, scale_TV, grad8_NT, scale_NU = quantise_fp8_rows_and_columns(grad_TN)
        grad_TI = product_with_weight(grad8_TN, scale_TV, down, ends_E, torch.bfloat16, transposed=True)
        grad8_TJ, scale_TW, grad8_JT, scale_JU, hidden_IT, hidden_scale_IU = swiglu_backward_quantise_fp8(
            grad_TI, gate_up_TJ
        )
        if for_down:
            grad_down = gradient_of_weight(grad8_NT, scale_NU, hidden_IT, hidden_scale_IU, ends_E, down.dtype)
        if for_gate_up:
            x_KT, x_scale_KU = x_columns
            grad_gate_up = gradient_of_weight(grad8_JT, scale_JU, x_KT, x_scale_KU, ends_E, gate_up.dtype)
        if for_x:
            grad_x = product_with_weight(grad8_TJ, scale_TW, gate_up, ends_E, ctx.x_dtype, transposed=True)
        return grad_x, grad_gate_up, grad_down, None, None


def _even(operator: str, argument: str, gates_and_ups: int) -> None:
    require(
        gates_and_ups % 2 == 0,
        operator,
        argument,
        f"has {gates_and_ups} rows; expected an even number, gates first and as many ups after",
    )


def fp8_feed_forward(x_TK: Tensor, gate_up_JK: Tensor, down_NI: Tensor) -> Tensor:
    """x_TK [..., K], gate_up_JK [2 I, K] (gates first) and down_NI [N, I], in any float dtype -> [..., N] in bfloat16.

    K, I and N have to be multiples of 16. Gradients come in the dtypes of the arguments, computed in FP8 as well.
    """
    require(x_TK.ndim >= 1, DENSE, "x_TK", "is a single number; expected [..., K]")
    require_shape(DENSE, "gate_up_JK", gate_up_JK, (None, x_TK.shape[-1]), "[2 I, K]")
    _even(DENSE, "gate_up_JK", gate_up_JK.shape[0])
    require_shape(DENSE, "down_NI", down_NI, (None, gate_up_JK.shape[0] // 2), "[N, I]")
    require_weight(DENSE, "gate_up_JK", gate_up_JK, x_TK, "[2 I, K]")
    require_weight(DENSE, "down_NI", down_NI, x_TK, "[N, I]")
    trains = gate_up_JK.requires_grad and torch.is_grad_enabled()
    y_TN = _FeedForward.apply(x_TK.reshape(-1, x_TK.shape[-1]), gate_up_JK, down_NI, None, trains)
    return y_TN.view(*x_TK.shape[:-1], down_NI.shape[0])


def fp8_grouped_feed_forward(x_TK: Tensor, gate_up_EJK: Tensor, down_ENI: Tensor, ends_E: Tensor) -> Tensor:
    """x_TK [T, K] in group order, gate_up_EJK [E, 2 I, K] (gates first) and down_ENI [E, N, I] -> [T, N] in bfloat16.

    Group e is the rows ends[e-1] .. ends[e] of ends_E [E] int32, all of them multiples of 128 and at most T (not
    checked: the host would wait). Rows after the last end become zero and get no gradient. K, I and N have to be
    multiples of 16. Gradients come in the dtypes of the arguments.
    """
    require_shape(GROUPED, "x_TK", x_TK, (None, None), "[T, K]")
    require_shape(GROUPED, "gate_up_EJK", gate_up_EJK, (None, None, x_TK.shape[1]), "[E, 2 I, K]")
    groups, gates_and_ups = gate_up_EJK.shape[:2]
    _even(GROUPED, "gate_up_EJK", gates_and_ups)
    require_shape(GROUPED, "down_ENI", down_ENI, (groups, None, gates_and_ups // 2), "[E, N, I]")
    require_weight(GROUPED, "gate_up_EJK", gate_up_EJK, x_TK, "[E, 2 I, K]")
    require_weight(GROUPED, "down_ENI", down_ENI, x_TK, "[E, N, I]")
    require_ends(GROUPED, ends_E, groups, x_TK.device)
    trains = gate_up_EJK.requires_grad and torch.is_grad_enabled()
    y_TN: Tensor = _FeedForward.apply(x_TK, gate_up_EJK, down_ENI, ends_E, trains)
    return y_TN
