"""SwiGLU with quantisation: against torch's own silu and autograd, to the precision of e4m3."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deepwright_kernels import swiglu_backward_quantise_fp8, swiglu_quantise_fp8


def values_of(values: Tensor, scales: Tensor) -> Tensor:
    return values.float() * scales.repeat_interleave(128, 1)[:, : values.shape[1]]


def assert_quantised(have: tuple[Tensor, Tensor], want: Tensor) -> None:
    """Three bits of mantissa, or half a step of the smallest values: 448 steps of 2⁻⁹ are the largest of 128."""
    step = have[1].repeat_interleave(128, 1)[:, : want.shape[1]] * 2.0**-9
    assert ((values_of(*have) - want).abs() <= torch.maximum(want.abs() / 16, step / 2) * 1.001).all()


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 128), (130, 96), (5, 192), (0, 16)])
def test_forward_and_backward(tokens: int, hidden: int) -> None:
    draw = torch.Generator().manual_seed(hidden)
    gate_up = (3 * torch.randn(tokens, 2 * hidden, generator=draw)).requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    want = functional.silu(gate) * up
    grad = torch.randn(want.shape, generator=draw)
    (want_grad,) = torch.autograd.grad(want, gate_up, grad)
    assert_quantised(swiglu_quantise_fp8(gate_up.detach()), want.detach())
    rows, rows_scale, columns, columns_scale, hidden_T, hidden_scale = swiglu_backward_quantise_fp8(
        grad, gate_up.detach()
    )
    assert_quantised((rows, rows_scale), want_grad)
    assert_quantised((columns, columns_scale), want_grad.T)
    assert_quantised((hidden_T, hidden_scale), want.detach().T)


def test_scales_may_be_powers_of_two() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    results = (*swiglu_quantise_fp8(x, True), *swiglu_backward_quantise_fp8(x[:, :32], x, True))
    assert all((scales.log2() % 1 == 0).all() for scales in results[1::2])


def test_errors_name_the_argument() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"gate_up_TJ has the shape \[3, 7\]; expected an even number of columns"):
        swiglu_quantise_fp8(x[:, :7])
    with pytest.raises(ValueError, match=r"grad_TI has shape \[3, 8\]; expected \[T, I\] = \[3, 4\]"):
        swiglu_backward_quantise_fp8(x, x)
    with pytest.raises(TypeError, match="grad_TI is bfloat16; expected one of float32"):
        swiglu_backward_quantise_fp8(x[:, :4].bfloat16(), x)
