"""The norm, alone and after an addition: kernel against reference."""

import pytest
import torch

from deepwright_kernels import add_rms_norm, dispatch, rms_norm

from .sides import OPCHECKS, TOLERANCE, both, draw

SHAPES = [(1, 1), (5, 7), (2, 3, 129), (9, 64), (7, 600), (0, 8)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype, grad=True), draw(shape[-1], grad=True)
    want, have = both("rms_norm", (x, weight, 1e-5), (x, weight), draw(*shape, dtype=dtype))
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, residual = draw(*shape, dtype=x_dtype, grad=True), draw(*shape, dtype=dtype, grad=True)
    weight = draw(shape[-1], grad=True)
    upstream = (draw(*shape, dtype=dtype), draw(*shape, dtype=dtype))
    results = []
    for backend in ("reference", "triton"):
        outputs = dispatch.load("add_rms_norm", backend)(x, residual, weight, 1e-5)
        results.append((*outputs, *torch.autograd.grad(outputs, (x, residual, weight), upstream)))
    for want, have in zip(*results, strict=True):
        assert have.dtype == want.dtype
        torch.testing.assert_close(have, want, **TOLERANCE[x_dtype])


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_when_one_of_the_two_results_is_used(used: int) -> None:
    x, residual, weight = draw(5, 7, grad=True), draw(5, 7, grad=True), draw(7, grad=True)
    leaves = (x, residual, weight)[: 3 - used]
    want, have = (
        torch.autograd.grad(dispatch.load("add_rms_norm", backend)(x, residual, weight, 1e-5)[used].sin().sum(), leaves)
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_rms_norm_of_a_slice_with_huge_values() -> None:
    wide = draw(6, 40) * 1e18
    x, weight = wide[:, 3:20], draw(17)
    torch.testing.assert_close(rms_norm(x, weight, 0.0), dispatch.load("rms_norm", "reference")(x, weight, 0.0))
    want = dispatch.load("add_rms_norm", "reference")(x, wide[:, 20:37], weight, 0.0)
    torch.testing.assert_close(add_rms_norm(x, wide[:, 20:37], weight, 0.0), want)


def test_gradients_are_the_same_every_time() -> None:
    x, weight, upstream = draw(33, 20, grad=True), draw(20, grad=True), draw(33, 20)
    for function in (rms_norm, lambda x, weight: add_rms_norm(x, x, weight)[0]):
        runs = [torch.autograd.grad(function(x, weight), (x, weight), upstream) for _ in range(2)]
        assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_add_rms_norm_keeps_torchs_rules() -> None:
    arguments = (draw(4, 6, grad=True), draw(4, 6, grad=True), draw(6, grad=True), 1e-6)
    torch.library.opcheck(torch.ops.deepwright.add_rms_norm.default, arguments, test_utils=OPCHECKS)
