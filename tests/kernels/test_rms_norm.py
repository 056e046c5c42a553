"""The norm against the formula in float64, and its gradients against finite differences."""

import pytest
import torch

from deepwright_kernels import add_rms_norm, configure, dispatch, rms_norm

BACKENDS = ["reference", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 33), (0, 8), (2, 0, 4)])
def test_follows_the_formula(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64) * 3, torch.randn(shape[-1], dtype=torch.float64)
    expected = x / ((x**2).sum(-1, keepdim=True) / shape[-1] + 1e-5).sqrt() * weight
    with configure({"rms_norm": backend}):
        y = rms_norm(x.float(), weight.float(), 1e-5)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_finite_differences(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: dispatch.load("rms_norm", backend)(a, b, 1e-3), (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_input_is_summed_in_float32(backend: str) -> None:
    # 300² · 512 overflows float16 long before it is averaged.
    x = torch.full((2, 512), 300.0, dtype=torch.float16)
    with configure({"rms_norm": backend}):
        y = rms_norm(x, torch.ones(512), 1e-6)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), torch.ones(2, 512), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_closed_form_are_those_of_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 40)[..., 3:30].to(dtype).requires_grad_()
    weight = torch.randn(27, requires_grad=True)
    upstream = torch.randn(2, 7, 27).to(dtype)
    results = []
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = dispatch.load("rms_norm", backend)(x, weight, 1e-5)
            results.append(torch.autograd.grad(y, (x, weight), upstream))
    for want, have in zip(*results, strict=True):
        assert have.dtype == want.dtype
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(have, want, **tolerance)
    (alone,) = torch.autograd.grad(dispatch.load("rms_norm", "torch")(x.detach(), weight, 1e-5), weight, upstream)
    torch.testing.assert_close(alone, results[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_an_addition_the_rounded_sum_is_normed(backend: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33)
    for dtype, stream in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        x, residual = torch.randn(3, 5, 33).to(dtype), torch.randn(3, 5, 33).to(stream)
        with configure({"add_rms_norm": backend, "rms_norm": backend}):
            normed, summed = add_rms_norm(x, residual, weight, 1e-5)
            assert torch.equal(normed, rms_norm(summed, weight, 1e-5))
        assert summed.dtype == stream and torch.equal(summed, (x.double() + residual.double()).to(stream))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_both_results_by_finite_differences(backend: str) -> None:
    torch.manual_seed(0)
    leaves = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda a, b, c: dispatch.load("add_rms_norm", backend)(a, b, c, 1e-3), leaves)


def test_scale_of_the_input_does_not_matter() -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x * 1e4, weight, 0.0), rms_norm(x, weight, 0.0), rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \[7\]; expected \[D\] = \[8\]"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(TypeError, match="x is int64"):
        rms_norm(torch.ones(2, 8, dtype=torch.long), torch.ones(8))
    with pytest.raises(ValueError, match="eps is -1"):
        rms_norm(x, torch.ones(8), -1.0)
    with pytest.raises(ValueError, match="weight is on meta"):
        rms_norm(x, torch.ones(8, device="meta"))
    with pytest.raises(ValueError, match=r"add_rms_norm: residual has shape \[2, 7\]; expected x's shape = \[2, 8\]"):
        add_rms_norm(x, x[:, :7], torch.ones(8))
    with pytest.raises(TypeError, match="add_rms_norm: residual is int64"):
        add_rms_norm(x, torch.ones(2, 8, dtype=torch.long), torch.ones(8))
