"""Layers in FP8 against the same layers in float32: values and gradients within a few per cent, and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deepwright_kernels import (
    dispatch,
    fp8_feed_forward,
    fp8_grouped_feed_forward,
    fp8_grouped_linear,
    fp8_linear,
    quantise_fp8_columns,
)

ENDS = [128, 128, 384]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_()


def ends() -> Tensor:
    return torch.tensor(ENDS, dtype=torch.int32)


def grouped(x: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
    result: Tensor = dispatch.load("grouped_linear", "reference")(x, weight, ends_E)
    return result


def gated(product: Callable[..., Tensor], *groups: Tensor) -> Callable[..., Tensor]:
    def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = product(x, gate_up, *groups).chunk(2, -1)
        return product(functional.silu(gate) * up, down, *groups)

    return run


def off(have: Tensor, want: Tensor) -> float:
    return float(((have.double() - want.double()).norm() / want.double().norm()).detach())


def compare(layer: Callable[..., Tensor], plain: Callable[..., Tensor], *arguments: Tensor, within: float) -> None:
    have = layer(*arguments)
    want = plain(*(argument.float() for argument in arguments))
    assert have.dtype == torch.bfloat16 and off(have, want) < within
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad(have, arguments, grad.bfloat16())
    for argument, a, b in zip(arguments, gradients, torch.autograd.grad(want, arguments, grad), strict=True):
        assert a.dtype == argument.dtype and a.shape == argument.shape and off(a, b) < within


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear(dtype: torch.dtype) -> None:
    compare(fp8_linear, functional.linear, draw(3, 7, 208, dtype=dtype), draw(144, 208), within=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_linear(dtype: torch.dtype) -> None:
    compare(
        lambda x, w: fp8_grouped_linear(x, w, ends()),
        lambda x, w: grouped(x, w, ends()),
        draw(400, 80, dtype=dtype),
        draw(3, 144, 80, dtype=dtype),
        within=0.05,
    )


def test_feed_forward() -> None:
    compare(fp8_feed_forward, gated(functional.linear), draw(2, 70, 144), draw(192, 144), draw(48, 96), within=0.1)


def test_grouped_feed_forward() -> None:
    compare(
        lambda *arguments: fp8_grouped_feed_forward(*arguments, ends()),
        gated(grouped, ends()),
        draw(400, 80, dtype=torch.bfloat16),
        draw(3, 64, 80),
        draw(3, 48, 32),
        within=0.1,
    )


def test_the_feed_forward_is_what_its_layers_would_do() -> None:
    """But for the rounding of hidden values to bf16 on the way, which it leaves out."""
    x, gate_up, down = draw(9, 64, dtype=torch.bfloat16), draw(96, 64), draw(32, 48)
    have, want = fp8_feed_forward(x, gate_up, down), gated(fp8_linear)(x, gate_up, down)
    assert off(have, want) < 0.03


def test_rows_after_the_last_end_are_zero_and_get_no_gradient_and_empty_groups_neither() -> None:
    x, weight = draw(400, 32), draw(3, 16, 32)
    y = fp8_grouped_linear(x, weight, ends())
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert (y[384:] == 0).all() and (grad_x[384:] == 0).all() and (grad_weight[1] == 0).all()
    assert (grad_weight[2] != 0).any()


def test_no_tokens() -> None:
    x, weight = draw(0, 32), draw(16, 32)
    y = fp8_linear(x, weight)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert y.shape == (0, 16) and grad_x.shape == (0, 32) and (grad_weight == 0).all()


def test_only_what_is_wanted_is_computed_and_kept() -> None:
    x, weight = draw(8, 32), draw(16, 32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fp8_linear(x, weight.detach()).sum().backward()
        assert [tensor.shape for tensor in kept] == [(16, 32)] and x.grad is not None
        kept.clear()
        fp8_linear(x.detach(), weight).sum().backward()
    values, scales = quantise_fp8_columns(x.detach())
    assert [tensor.dtype for tensor in kept] == [torch.float32, values.dtype, scales.dtype]
    assert torch.equal(kept[1].float(), values.float()) and torch.equal(kept[2], scales)


def test_under_autocast_the_reference_still_adds_up_in_float32() -> None:
    x, weight = draw(5, 256, dtype=torch.bfloat16), draw(16, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_linear(x, weight), fp8_linear(x.detach(), weight.detach()))
    assert torch.equal(fp8_linear(x, weight), torch.autocast("cpu", torch.bfloat16)(fp8_linear)(x, weight))


@pytest.mark.costly
def test_torch_compile_takes_the_whole_of_a_layer() -> None:
    leaves = draw(6, 64, dtype=torch.bfloat16), draw(96, 64), draw(32, 48)
    compiled: Any = torch.compile(fp8_feed_forward, fullgraph=True, backend="aot_eager")
    have, want = compiled(*leaves), fp8_feed_forward(*leaves)
    assert torch.equal(have, want)
    gradients = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (have, want)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_errors_name_the_argument() -> None:
    x, ends_E = draw(8, 32), torch.tensor([0, 0], dtype=torch.int32)
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            ValueError,
            r"weight_NK has shape \[20, 32\]; expected .* multiples of 16",
            lambda: fp8_linear(x, draw(20, 32)),
        ),
        (ValueError, r"weight_NK has shape \[16, 48\]", lambda: fp8_linear(x, draw(16, 48))),
        (TypeError, "x_TK is int64", lambda: fp8_linear(x.long(), draw(16, 32))),
        (ValueError, "weight_NK is on meta", lambda: fp8_linear(x, draw(16, 32).to("meta"))),
        (ValueError, r"weight_ENK has shape \[16, 32\]", lambda: fp8_grouped_linear(x, draw(16, 32), ends_E)),
        (ValueError, r"ends_E has shape \[2\]", lambda: fp8_grouped_linear(x, draw(3, 16, 32), ends_E)),
        (ValueError, "gate_up_JK has 33 rows", lambda: fp8_feed_forward(x, draw(33, 32), draw(16, 16))),
        (ValueError, r"down_NI has shape \[16, 32\]", lambda: fp8_feed_forward(x, draw(32, 32), draw(16, 32))),
        (
            ValueError,
            r"down_ENI has shape \[1, 16, 16\]",
            lambda: fp8_grouped_feed_forward(x, draw(2, 32, 32), draw(1, 16, 16), ends_E),
        ),
    ]
    for error, words, call in wrong:
        with pytest.raises(error, match=words):
            call()
