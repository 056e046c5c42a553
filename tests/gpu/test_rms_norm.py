"""The norm on a GPU: real widths with and without an addition, and graphs that go through whole."""

import pytest
import torch

from deepwright_kernels import add_rms_norm, backend_for, dispatch, rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]


@pytest.mark.parametrize(("rows", "width"), [(4096, 512), (4096, 1536), (4096, 2048), (4097, 7168), (3, 16384)])
def test_add_rms_norm_at_real_widths(rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(rows, width, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    weight = torch.randn(width, device="cuda", requires_grad=True)
    upstream = (torch.randn_like(x), torch.randn_like(x))
    assert backend_for("add_rms_norm", x) == "triton"
    results = []
    for function in (add_rms_norm, dispatch.load("add_rms_norm", "reference")):
        outputs = function(x, residual, weight, 1e-6)
        results.append((*outputs, *torch.autograd.grad(outputs, (x, residual, weight), upstream)))
    for have, want in zip(*results, strict=True):
        assert have.dtype == want.dtype
        assert (have.float() - want.float()).norm() / want.float().norm() < 5e-3


def test_inductor_and_a_cuda_graph_go_through_both_norms() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(64, 256, device="cuda"), torch.randn(64, 256, device="cuda")
    weight = torch.randn(256, device="cuda")

    def model(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        normed, summed = add_rms_norm(rms_norm(x, weight), residual, weight)
        return normed.sin() + summed

    want = model(x, residual)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x, residual), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(x, residual)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, model(x, residual))
