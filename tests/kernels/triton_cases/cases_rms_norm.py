"""The norm: kernel against reference."""

import pytest
import torch

from deepwright_kernels import dispatch, rms_norm

from .sides import TOLERANCE, both, draw


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 129), (9, 64), (0, 8)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype, grad=True), draw(shape[-1], grad=True)
    want, have = both("rms_norm", (x, weight, 1e-5), (x, weight), draw(*shape, dtype=dtype))
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


def test_rms_norm_of_a_slice_with_huge_values() -> None:
    wide = draw(6, 40) * 1e18
    x, weight = wide[:, 3:20], draw(17)
    torch.testing.assert_close(rms_norm(x, weight, 0.0), dispatch.load("rms_norm", "reference")(x, weight, 0.0))


def test_rms_norm_gradients_are_the_same_every_time() -> None:
    x, weight, upstream = draw(33, 20, grad=True), draw(20, grad=True), draw(33, 20)
    runs = [torch.autograd.grad(rms_norm(x, weight), (x, weight), upstream) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
