"""The operators compiled on a GPU: the interpreter's cases at once, then real sizes, CUDA graphs and torch.compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepwright_kernels import (
    backend_for,
    configure,
    dispatch,
    grouped_linear,
    rms_norm,
    rotary,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

CASES = Path(__file__).parents[1] / "kernels" / "triton_cases"
TILES = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


@pytest.mark.parametrize("cases", sorted(path.name for path in CASES.glob("cases_*.py")))
def test_the_interpreters_cases_compiled(cases: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES / cases), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_auto_takes_the_kernels() -> None:
    x = torch.zeros(1, device="cuda")
    assert {name: backend_for(name, x) for name in ("rms_norm", "rotary", "mla_paged_decode")} == {
        "rms_norm": "triton",
        "rotary": "triton",
        "mla_paged_decode": "cuda" if torch.cuda.get_device_capability() == (9, 0) else "triton",
    }


@pytest.mark.skipif(not TILES, reason="its tiles are for Hopper and Blackwell GPUs")
def test_few_large_groups_take_torchs_product() -> None:
    """Which is level there or ahead; not in float16, where torch's product waits for the host."""

    def choice(groups: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> str:
        x_TK = torch.empty(groups * rows, 64, device="cuda", dtype=dtype)
        weight_ENK = torch.empty(groups, 64, 64, device="cuda", dtype=dtype)
        return backend_for("grouped_linear", x_TK, weight_ENK, torch.empty(groups, device="cuda", dtype=torch.int32))

    assert [choice(8, 4096), choice(16, 2048)] == ["torch"] * 2
    assert [choice(8, 1024), choice(64, 3072), choice(64, 8), choice(8, 4096, torch.float16)] == ["triton"] * 4


@pytest.mark.parametrize("width", [128, 2048, 7168])
def test_rms_norm_at_real_widths(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, width, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(width, device="cuda", requires_grad=True)
    upstream = torch.randn_like(x)
    have = torch.autograd.grad(rms_norm(x, weight), (x, weight), upstream)
    want = torch.autograd.grad(dispatch.load("rms_norm", "reference")(x, weight, 1e-6), (x, weight), upstream)
    for a, b in zip(have, want, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 5e-3


@pytest.mark.parametrize("inputs", [256, 100])
def test_grouped_linear_with_empty_groups_and_no_host_synchronisation(inputs: int) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([100, 0, 300, 1, 0, 623])
    ends_E = counts.cumsum(0).int().cuda()
    x_TK = torch.randn(int(counts.sum()), inputs, device="cuda").bfloat16().requires_grad_()
    weight_ENK = torch.randn(len(counts), 128, inputs, device="cuda").bfloat16().requires_grad_()
    upstream_TN = torch.randn(len(x_TK), 128, device="cuda").bfloat16()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TN = grouped_linear(x_TK, weight_ENK, ends_E)
        have = (y_TN, *torch.autograd.grad(y_TN, (x_TK, weight_ENK), upstream_TN))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want_TN = dispatch.load("grouped_linear", "reference")(x_TK, weight_ENK, ends_E)
    want = (want_TN, *torch.autograd.grad(want_TN, (x_TK, weight_ENK), upstream_TN))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_a_cuda_graph_replays_the_kernels() -> None:
    x = torch.randn(64, 256, device="cuda")
    weight, angle = torch.randn(256, device="cuda"), torch.randn(64, 128, device="cuda")
    cos, sin = angle.cos(), angle.sin()

    def model() -> torch.Tensor:
        return rotary(rms_norm(x, weight), cos, sin)

    model()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, model())


def test_inductor_goes_through_the_kernels_whole() -> None:
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    weight, angle = torch.randn(256, device="cuda", requires_grad=True), torch.randn(64, 128, device="cuda")
    cos, sin = angle.cos(), angle.sin()

    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (rotary(rms_norm(x * 2, weight), cos, sin).sin() + x).sum()

    have = torch.autograd.grad(torch.compile(model, fullgraph=True)(x, weight), (x, weight))
    with configure({"*": "reference"}):
        want = torch.autograd.grad(model(x, weight), (x, weight))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
