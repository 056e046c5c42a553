"""The rotation against complex numbers, and the property it exists for: scores depend on distances only."""

from collections.abc import Iterator

import pytest
import torch

from deepwright_kernels import configure, rotary, rotary_tail


@pytest.fixture(params=["reference", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with configure({"rotary": request.param, "rotary_tail": request.param}):
        yield


def test_is_a_product_of_complex_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64)
    angle = torch.randn(3, 1, 5, dtype=torch.float64)
    turned = torch.view_as_complex(x.unflatten(-1, (5, 2))) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotary(x, angle.cos(), angle.sin()), torch.view_as_real(turned).flatten(-2))


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    frequency_F = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        return rotary(q, (i * frequency_F).cos(), (i * frequency_F).sin()) @ rotary(
            k, (j * frequency_F).cos(), (j * frequency_F).sin()
        )

    torch.testing.assert_close(score(3, 1), score(103, 101))
    assert abs(score(3, 1) - score(3, 2)) > 1e-6


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: rotary(a, angle.cos(), angle.sin()), (x,))


def test_a_slice_of_a_wider_tensor() -> None:
    wide, angle = torch.randn(2, 3, 9), torch.randn(3, 2)
    x = wide[..., 1:5]
    torch.testing.assert_close(rotary(x, angle.cos(), angle.sin()), rotary(x.clone(), angle.cos(), angle.sin()))


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_tail_is_turned_and_the_rest_stays(kept: int) -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 4, kept + 6), torch.randn(3, 1, 3)
    y = rotary_tail(x, angle.cos(), angle.sin())
    assert torch.equal(y[..., :kept], x[..., :kept])
    assert torch.equal(y[..., kept:], rotary(x[..., kept:], angle.cos(), angle.sin()))


def test_gradients_of_a_tail_by_finite_differences() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True), torch.randn(3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: rotary_tail(a, angle.cos(), angle.sin()), (x,))


def test_rounds_once() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(4, 32).bfloat16(), torch.randn(4, 16)
    exact = rotary(x.double(), angle.cos().double(), angle.sin().double())
    y = rotary(x, angle.cos(), angle.sin())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0.008, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
def test_nothing_to_turn(shape: tuple[int, ...]) -> None:
    angle = torch.zeros(shape[-1] // 2)
    assert rotary(torch.randn(shape), angle, angle).shape == shape


def test_errors_name_the_argument() -> None:
    x, angle = torch.randn(2, 3, 8), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"x has shape \[2, 7\]; expected an even last size"):
        rotary(torch.randn(2, 7), angle, angle)
    with pytest.raises(ValueError, match=r"cos has shape \[5, 4\], which does not broadcast to \[2, 3, 4\]"):
        rotary(x, torch.randn(5, 4), torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"cos has shape \[3, 1\]"):
        rotary(x, angle[:, :1], angle[:, :1])
    with pytest.raises(ValueError, match="sin has shape"):
        rotary(x, angle, angle[:1])
    with pytest.raises(ValueError, match=r"cos has shape \[9, 2, 3, 4\]"):
        rotary(x, torch.randn(9, 2, 3, 4), torch.randn(9, 2, 3, 4))
    with pytest.raises(ValueError, match="rotary_tail: cos has 5 angles, which turn 10 values, and x has 8"):
        rotary_tail(x, torch.randn(3, 5), torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"rotary_tail: sin has shape \[3, 1\] and cos \[3, 2\]"):
        rotary_tail(x, angle[:, :2], angle[:, :1])
