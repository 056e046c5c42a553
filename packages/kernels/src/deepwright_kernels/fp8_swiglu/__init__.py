"""SwiGLU fused with what FP8 products need of it: quantised hidden values forward, quantised gradients backward.

The hidden values and the gradient of gate and up exist in FP8 only: neither is written in bf16. The backward operator
computes the hidden values again from gate and up, so nothing but those is kept between the passes. No autograd here:
the layers of fp8_linear call both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, require_shape, shape_of
from ..fp8_layout import BLOCK

FORWARD, BACKWARD = "swiglu_quantise_fp8", "swiglu_backward_quantise_fp8"


def _why_not_hopper(grad_TI: Tensor, gate_up_TJ: Tensor, *_: bool) -> str | None:
    if gate_up_TJ.dtype != torch.bfloat16:
        return "its kernel is for bfloat16"
    return "its kernel is for hidden sizes that are multiples of 128" if gate_up_TJ.shape[-1] % (2 * BLOCK) else None


def _fastest_on_cuda(grad_TI: Tensor, *others: Any) -> tuple[str, ...]:
    ours = others and _why_not_hopper(grad_TI, *others) is None
    return ("cuda", "triton", "reference") if ours else ("triton", "reference")


dispatch.operator(FORWARD, {"reference": f"{__name__}.reference:{FORWARD}", "triton": f"{__name__}.triton:{FORWARD}"})
dispatch.operator(
    BACKWARD,
    {
        "reference": f"{__name__}.reference:{BACKWARD}",
        "triton": f"{__name__}.triton:{BACKWARD}",
        "cuda": f"{__name__}.hopper:{BACKWARD}",
    },
    cuda=_fastest_on_cuda,
    needs={"cuda": _why_not_hopper},
)


def _require(operator: str, gate_up_TJ: Tensor) -> None:
    require_shape(operator, "gate_up_TJ", gate_up_TJ, (None, None), "[T, 2 I]")
    require_dtype(operator, "gate_up_TJ", gate_up_TJ, FLOATS)
    require(
        gate_up_TJ.shape[1] % 2 == 0,
        operator,
        "gate_up_TJ",
        f"has the shape {shape_of(gate_up_TJ)}; expected an even number of columns, gates first and as many ups after",
    )


def swiglu_quantise_fp8(gate_up_TJ: Tensor, power_of_two_scales: bool = False) -> tuple[Tensor, Tensor]:
    """gate_up_TJ [T, 2 I], gates first -> silu(gate) · up as e4m3 values [T, I] and row scales [T, ⌈I/128⌉].

    Computed in float32 and rounded to the input's dtype, as separate operators would do, and then to e4m3. Values and
    scales as `quantise_fp8_rows` gives them.
    """
    _require(FORWARD, gate_up_TJ)
    values_TI, scale_TV = dispatch.run(FORWARD, gate_up_TJ, power_of_two_scales)
    return values_TI, scale_TV


def swiglu_backward_quantise_fp8(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the backward pass of a feed-forward needs around SwiGLU, all quantised, reading both arguments once.

    grad_TI [T, I], the gradient of silu(gate) · up, and gate_up_TJ [T, 2 I] -> six tensors:
    - the gradient of gate and up: values [T, 2 I] and row scales [T, ⌈2 I/128⌉], for dgrad;
    - the same transposed, quantised along the tokens: values [2 I, T] and row scales [2 I, ⌈T/128⌉], for wgrad;
    - silu(gate) · up transposed, quantised along the tokens: values [I, T] and row scales [I, ⌈T/128⌉], for wgrad.
    """
    _require(BACKWARD, gate_up_TJ)
    tokens, columns = gate_up_TJ.shape
    require_shape(BACKWARD, "grad_TI", grad_TI, (tokens, columns // 2), "[T, I]")
    require_dtype(BACKWARD, "grad_TI", grad_TI, (gate_up_TJ.dtype,))
    require_device(BACKWARD, "gate_up_TJ", gate_up_TJ, grad_TI.device)
    grad_TJ, grad_scale_TV, grad_JT, grad_scale_JU, hidden_IT, hidden_scale_IU = dispatch.run(
        BACKWARD, grad_TI, gate_up_TJ, power_of_two_scales
    )
    return grad_TJ, grad_scale_TV, grad_JT, grad_scale_JU, hidden_IT, hidden_scale_IU
