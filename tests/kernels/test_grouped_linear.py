"""The grouped product row by row, its gradients, empty groups, and sizes that torch's own operation refuses."""

import pytest
import torch

from deepwright_kernels import configure, dispatch, grouped_linear

BACKENDS = ["reference", "torch"]


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(8, 16), (5, 7), (1, 1), (12, 3)])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 5], [7], [0, 0], [1, 1, 1, 1]])
def test_every_row_meets_its_own_weight(backend: str, sizes: tuple[int, int], counts: list[int]) -> None:
    torch.manual_seed(0)
    inputs, outputs = sizes
    x_TK = torch.randn(sum(counts), inputs, requires_grad=True)
    weight_ENK = torch.randn(len(counts), outputs, inputs, requires_grad=True)
    upstream_TN = torch.randn(sum(counts), outputs)
    with configure({"grouped_linear": backend}):
        y_TN = grouped_linear(x_TK, weight_ENK, ends(counts))
    have = torch.autograd.grad(y_TN, (x_TK, weight_ENK), upstream_TN)

    group_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    want_TN = torch.einsum("tk,tnk->tn", x_TK, weight_ENK[group_T])
    want = torch.autograd.grad(want_TN, (x_TK, weight_ENK), upstream_TN)
    torch.testing.assert_close(y_TN, want_TN, rtol=1e-4, atol=1e-5)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", [16, 13])
def test_bfloat16_forwards_and_backwards(inputs: int) -> None:
    torch.manual_seed(0)
    x_TK = torch.randn(20, inputs).bfloat16().requires_grad_()
    weight_ENK = torch.randn(4, 24, inputs).bfloat16().requires_grad_()
    results = []
    for backend in BACKENDS:
        y_TN = dispatch.load("grouped_linear", backend)(x_TK, weight_ENK, ends([5, 0, 14, 1]))
        results.append((y_TN, *torch.autograd.grad(y_TN.float().square().sum(), (x_TK, weight_ENK))))
    for want, have in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=0.02, atol=0.05)


def test_under_autocast_it_is_made_in_autocasts_dtype() -> None:
    x_TK, weight_ENK = torch.randn(6, 8), torch.randn(2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TN = grouped_linear(x_TK, weight_ENK, ends([2, 4]))
    assert y_TN.dtype == torch.bfloat16
    y_TN.float().sum().backward()
    assert weight_ENK.grad.dtype == torch.float32


def test_errors_name_the_argument() -> None:
    x_TK, weight_ENK = torch.randn(4, 8), torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match=r"weight_ENK has shape \[2, 6, 7\]; expected \[E, N, K\] = \[any, any, 8\]"):
        grouped_linear(x_TK, weight_ENK[:, :, :7], ends([2, 2]))
    with pytest.raises(TypeError, match="weight_ENK is bfloat16; expected one of float32"):
        grouped_linear(x_TK, weight_ENK.bfloat16(), ends([2, 2]))
    with pytest.raises(ValueError, match=r"offsets_E has shape \[3\]; expected \[E\] = \[2\]"):
        grouped_linear(x_TK, weight_ENK, ends([2, 1, 1]))
    with pytest.raises(TypeError, match="offsets_E is int64; expected one of int32"):
        grouped_linear(x_TK, weight_ENK, ends([2, 2]).long())
