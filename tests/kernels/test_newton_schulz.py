"""Newton-Schulz against singular values, which it exists to change, and against itself one matrix at a time."""

from collections.abc import Iterator

import pytest
import torch

from deepwright_kernels import configure, newton_schulz


@pytest.fixture(params=["reference", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with configure({"newton_schulz": request.param}):
        yield


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4), (1, 5)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    """Near as the published coefficients come: between 0.7 and 1.2, whatever the spread was; directions are kept."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    spread = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    (result,) = newton_schulz((u @ spread.diag() @ vh * 300)[None], 5)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.65 and singular.max() < 1.25
    mixed = u.T @ result @ vh.T
    torch.testing.assert_close(mixed, mixed.diagonal().diag(), atol=1e-9, rtol=0)
    assert (mixed.diagonal() > 0).all()


def test_each_singular_value_follows_the_quintic() -> None:
    """Jordan et al. 2024: s ← a·s + b·s³ + c·s⁵ on each singular value, from s over the Frobenius norm."""
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(5, 9, dtype=torch.float64), full_matrices=False)
    expected = s / s.square().sum().sqrt()
    for _ in range(3):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    (result,) = newton_schulz((u @ s.diag() @ vh)[None], 3)
    torch.testing.assert_close(result, u @ expected.diag() @ vh, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 3, 6)])
def test_a_stack_of_matrices_is_a_batch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stack = (torch.randn(shape) * torch.tensor([1.0, 10.0, 0.1, 100.0])[:, None, None]).to(dtype)
    want = torch.cat([newton_schulz(matrix[None], 5) for matrix in stack])
    have = newton_schulz(stack, 5)
    assert have.dtype == dtype and have.shape == shape
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(have, want, **tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 3), (0, 3, 4)])
def test_zeros_stay_zeros_and_no_nan(shape: tuple[int, int, int]) -> None:
    assert torch.equal(newton_schulz(torch.zeros(shape), 5), torch.zeros(shape))


def test_the_input_is_left_alone() -> None:
    stack = torch.randn(2, 4, 3)
    before = stack.clone()
    newton_schulz(stack, 2)
    assert torch.equal(stack, before)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"matrices_EMN has shape \[3, 4\]; expected \[E, M, N\]"):
        newton_schulz(torch.ones(3, 4))
    with pytest.raises(TypeError, match="matrices_EMN is int64"):
        newton_schulz(torch.ones(1, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="steps is 0; expected at least 1"):
        newton_schulz(torch.ones(1, 3, 4), 0)
    with pytest.raises(ValueError, match="matrices_EMN requires a gradient and an update rule has none"):
        newton_schulz(torch.ones(1, 3, 4, requires_grad=True))
