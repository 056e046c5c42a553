"""The rotation of pairs, of a whole vector and of its tail: kernel against reference."""

import pytest
import torch

from deepwright_kernels import dispatch, rotary, rotary_tail

from .sides import TOLERANCE, both, draw


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("x_shape", "angle_shape"),
    [
        ((6,), (3,)),
        ((5, 8), (5, 4)),
        ((2, 3, 4, 12), (3, 1, 6)),
        ((2, 3, 4, 64), (2, 3, 1, 32)),
        ((2, 3, 5, 6), (5, 3)),
        ((2, 2, 3, 2, 2), (3, 1, 1)),
        ((0, 4), (2,)),
    ],
)
def test_rotary(x_shape: tuple[int, ...], angle_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, angle = draw(*x_shape, dtype=dtype, grad=True), draw(*angle_shape)
    want, have = both("rotary", (x, angle.cos(), angle.sin()), (x,), draw(*x_shape, dtype=dtype))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("x_shape", "angle_shape"),
    [
        ((7,), (3,)),
        ((5, 9), (5, 2)),
        ((2, 3, 4, 192), (3, 1, 32)),
        ((2, 3, 5, 11), (5, 3)),
        ((2, 3, 4, 8), (3, 1, 4)),
        ((3, 0, 8), (2,)),
    ],
)
def test_rotary_tail(x_shape: tuple[int, ...], angle_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, angle = draw(*x_shape, dtype=dtype, grad=True), draw(*angle_shape)
    want, have = both("rotary_tail", (x, angle.cos(), angle.sin()), (x,), draw(*x_shape, dtype=dtype))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


@pytest.mark.parametrize("function", [rotary, rotary_tail])
def test_a_slice_and_angles_that_lie_differently(function) -> None:
    x = draw(2, 5, 3, 20)[..., 6:14]
    cos, sin = draw(5, 4)[:, None], draw(4, 5).T[:, None]
    torch.testing.assert_close(function(x, cos, sin), dispatch.load(function.__name__, "reference")(x, cos, sin))
