"""FP8: the quantising kernels and the products against their references.

Quantising agrees to the bit, products to the order of their sums.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepwright_kernels import (
    dispatch,
    fp8_grouped_linear,
    fp8_grouped_matmul,
    fp8_grouped_outer,
    fp8_linear,
    fp8_matmul,
    quantise_fp8_blocks,
    quantise_fp8_columns,
    quantise_fp8_rows,
)
from deepwright_kernels.fp8_rows import triton as rows_triton

from .sides import DEVICE, OPCHECKS, draw

PRODUCT = {torch.bfloat16: 5e-3, torch.float32: 2e-3 if DEVICE == "cuda" else 1e-6}


def assert_same_values(have: Tensor, want: Tensor, steps: int) -> None:
    """e4m3 that differs by a few steps at most, counted in its bits; NaN in the same places."""
    assert have.dtype == want.dtype
    assert torch.equal(have.float().isnan(), want.float().isnan())
    number = ~want.float().isnan()
    a, b = (each.contiguous().view(torch.uint8).int()[number] for each in (have, want))
    near = (a & 127) + (b & 127) <= steps  # both signs of zero lie side by side
    assert (((a - b).abs() <= steps) | near).all()


def assert_quantised(have: tuple[Tensor, ...], want: tuple[Tensor, ...], steps: int = 0, rtol: float = 0.0) -> None:
    for a, b in zip(have, want, strict=True):
        assert a.shape == b.shape and (a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()))
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)
        else:
            assert_same_values(a, b, steps)


def sides(name: str, *arguments: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return dispatch.load(name, "triton")(*arguments), dispatch.load(name, "reference")(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["quantise_fp8_rows", "quantise_fp8_columns", "quantise_fp8_rows_and_columns"])
@pytest.mark.parametrize("shape", [(37, 200), (130, 7), (0, 16)])
def test_activations(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (draw(*shape) * 10 ** draw(shape[0], 1)).to(dtype)
    power_of_two = shape[0] == 37
    assert_quantised(*sides(name, x, power_of_two))


def test_activations_that_are_not_finite_huge_or_zero() -> None:
    x = draw(20, 256, dtype=torch.bfloat16)
    x[1, 3], x[2, 200], x[3, 5], x[4], x[5] = torch.nan, torch.inf, -torch.inf, 0, 3e38
    x[6, 128:], x[7] = 1e-40, 1e-5
    for power_of_two in (False, True):
        assert_quantised(*sides("quantise_fp8_rows_and_columns", x, power_of_two))


def test_activations_of_a_slice_and_of_a_transpose() -> None:
    x = draw(30, 200, dtype=torch.bfloat16)
    for view in (x[:, 33:170], x.T):
        assert_quantised(*sides("quantise_fp8_rows_and_columns", view, False))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 144, 200), (130, 16), (0, 16)])
def test_weights(shape: tuple[int, ...], transposed: bool) -> None:
    x = draw(*shape) * 10 ** draw(*shape[:-1], 1)
    assert_quantised(*sides("quantise_fp8_blocks", x, (128, 128), not transposed, transposed))


@pytest.mark.parametrize(("tokens", "hidden"), [(37, 256), (20, 72), (0, 128)])
def test_swiglu(tokens: int, hidden: int) -> None:
    """The exponential is not the same to the last bit, so a value may fall to the other side of a rounding."""
    gate_up, grad = 2 * draw(tokens, 2 * hidden), draw(tokens, hidden)
    assert_quantised(*sides("swiglu_quantise_fp8", gate_up, False), steps=1, rtol=1e-5)
    assert_quantised(*sides("swiglu_backward_quantise_fp8", grad, gate_up, False), steps=2, rtol=1e-5)


def assert_products(have: Tensor, want: Tensor) -> None:
    assert have.dtype == want.dtype and have.shape == want.shape
    assert torch.equal(have.isfinite(), want.isfinite())  # the interpreter reads NaN as a number, not its scale
    have, want = (each.where(want.isfinite(), 0) for each in (have, want))
    assert (have.float() - want.float()).norm() <= PRODUCT[want.dtype] * want.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("quantise", [quantise_fp8_blocks, quantise_fp8_rows])
@pytest.mark.parametrize("shape", [(1, 16, 16), (70, 144, 272)])
def test_products(
    shape: tuple[int, int, int], quantise: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    rows, outputs, inner = shape
    a, b = quantise_fp8_rows(draw(rows, inner) * 10 ** draw(rows, 1)), quantise(draw(outputs, inner))
    assert_products(*sides("fp8_matmul", *a, *b, dtype))


def test_a_product_with_what_is_not_finite_and_one_of_nothing() -> None:
    x, weight = draw(5, 144), quantise_fp8_blocks(draw(16, 144))
    x[1, 3], x[3, 140] = torch.nan, torch.inf
    assert_products(*sides("fp8_matmul", *quantise_fp8_rows(x), *weight, torch.bfloat16))
    columns = quantise_fp8_columns(draw(0, 32))
    assert (fp8_matmul(*columns, *columns) == 0).all()


@pytest.mark.parametrize("ends", [[128, 128, 256], [0, 256, 256], [0, 0, 0]])
def test_grouped_products(ends: list[int]) -> None:
    tokens, inputs, outputs = 270, 48, 80
    ends_E = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    x, grad = draw(tokens, inputs), draw(tokens, outputs)  # rows and columns that are no multiples of a tile's
    a, b = quantise_fp8_rows(x), quantise_fp8_blocks(draw(3, outputs, inputs))
    assert_products(*sides("fp8_grouped_matmul", *a, *b, ends_E, torch.bfloat16))
    assert (fp8_grouped_matmul(*a, *b, ends_E)[ends[-1] :] == 0).all()
    columns = *quantise_fp8_columns(grad), *quantise_fp8_columns(x)
    assert_products(*sides("fp8_grouped_outer", *columns, ends_E, torch.float32))
    empty = [group for group, end in enumerate(ends) if end == ([0, *ends])[group]]
    assert (fp8_grouped_outer(*columns, ends_E)[empty] == 0).all()


def test_gradients_of_layers_and_the_same_every_time() -> None:
    x, weight, grad = draw(20, 48, grad=True), draw(32, 48, grad=True), draw(20, 32)
    stack, ends_E = draw(2, 32, 48, grad=True), torch.tensor([0, 128], dtype=torch.int32, device=DEVICE)
    long, long_grad = draw(128, 48, grad=True), draw(128, 32)

    def both() -> tuple[Tensor, ...]:
        y, z = fp8_linear(x, weight), fp8_grouped_linear(long, stack, ends_E)
        dense = torch.autograd.grad(y, (x, weight), grad.bfloat16())
        return y, *dense, z, *torch.autograd.grad(z, (long, stack), long_grad.bfloat16())

    have, again = both(), both()
    assert all(torch.equal(a, b) for a, b in zip(have, again, strict=True))
    with dispatch.configure({"*": "reference"}):
        want = both()
    for a, b in zip(have, want, strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def test_the_operators_of_torch_are_whole() -> None:
    x = draw(20, 48)
    for operator in (rows_triton._rows, rows_triton._rows_and_columns):
        torch.library.opcheck(operator, (x, False), test_utils=OPCHECKS[:3])
