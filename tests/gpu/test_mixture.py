"""What a mixture does between its router and its output, on a GPU at real sizes: order, moves, grouped products."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import (
    backend_for,
    configure,
    dispatch,
    expert_order,
    grouped_linear,
    grouped_swiglu,
    permute,
    route,
    unpermute,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.parametrize(
    ("tokens", "copies", "experts", "alignment"),
    [(16384, 8, 256, 128), (16384, 6, 64, 1), (1024, 8, 256, 128), (1, 8, 384, 1)],
)
@pytest.mark.parametrize("load", ["spread", "one expert"])
def test_expert_order(tokens: int, copies: int, experts: int, alignment: int, load: str) -> None:
    torch.manual_seed(0)
    experts_TK = torch.rand(tokens, experts, device="cuda").topk(copies, -1).indices
    if load == "one expert":
        experts_TK.fill_(experts // 2)
    want = dispatch.load("expert_order", "reference")(experts_TK, experts, alignment)
    have = expert_order(experts_TK, experts, alignment)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("width", [2048, 7168])
def test_moves_and_their_gradients(width: int, alignment: int) -> None:
    torch.manual_seed(0)
    tokens, copies, experts = 2048, 8, 64
    order = expert_order(torch.randint(experts, (tokens, copies), device="cuda"), experts, alignment)
    x_TD = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    y_RD = torch.randn(len(order.order_R), width, device="cuda").bfloat16().requires_grad_()
    weights_TK = torch.rand(tokens, copies, device="cuda", requires_grad=True)
    upstream_RD, upstream_TD = torch.randn_like(y_RD), torch.randn_like(x_TD)
    sides = []
    for backend in ("reference", "triton"):
        with configure({"permute": backend, "unpermute": backend}):
            x_RD, out_TD = permute(x_TD, order), unpermute(y_RD, order, weights_TK)
        gradients = (
            *torch.autograd.grad(x_RD, x_TD, upstream_RD),
            *torch.autograd.grad(out_TD, (y_RD, weights_TK), upstream_TD),
        )
        sides.append((x_RD, out_TD, *gradients))
    for want, have in zip(*sides, strict=True):
        # The reference's own gradient adds up in bfloat16.
        assert (have.float() - want.float()).norm() <= 1e-2 * want.float().norm()


@hopper
@pytest.mark.parametrize("counts", [[300, 0, 400, 1, 129], [0, 0, 5000], [7], [384] * 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 704), (64, 136), (1408, 72)])
def test_grouped_linear_in_triton(counts: list[int], inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    ends_E = torch.tensor(counts, device="cuda").cumsum(0).int()
    x_TK = torch.randn(sum(counts), inputs, device="cuda").bfloat16().requires_grad_()
    weight_ENK = torch.randn(len(counts), outputs, inputs, device="cuda").bfloat16().requires_grad_()
    upstream_TN = torch.randn(sum(counts), outputs, device="cuda").bfloat16()
    sides = []
    for backend in ("torch", "triton"):
        with configure({"grouped_linear": backend}):
            y_TN = grouped_linear(x_TK, weight_ENK, ends_E)
        sides.append((y_TN, *torch.autograd.grad(y_TN, (x_TK, weight_ENK), upstream_TN)))
    for want, have in zip(*sides, strict=True):
        assert (have.float() - want.float()).norm() <= 1e-3 * want.float().norm()


@hopper
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize(("hidden", "width", "experts", "copies"), [(2048, 1408, 64, 6), (1000, 200, 5, 2)])
def test_grouped_swiglu_in_triton(hidden: int, width: int, experts: int, copies: int, alignment: int) -> None:
    torch.manual_seed(0)
    tokens = 700
    order = expert_order(torch.randint(experts, (tokens, copies), device="cuda"), experts, alignment)
    x_TD = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    gate_up_EID = (torch.randn(experts, 2 * width, hidden, device="cuda") * hidden**-0.5).bfloat16().requires_grad_()
    upstream_RI = torch.randn(len(order.order_R), width, device="cuda").bfloat16()
    upstream_RI[order.order_R < 0] = 0.0
    last = int(order.ends_E[-1])
    sides = []
    for backend in ("reference", "triton"):
        with configure({"grouped_swiglu": backend}):
            h_RI = grouped_swiglu(x_TD, gate_up_EID, order)
        sides.append((h_RI[:last], *torch.autograd.grad(h_RI, (x_TD, gate_up_EID), upstream_RI)))
    for want, have in zip(*sides, strict=True):
        assert (have.float() - want.float()).norm() <= 1e-2 * want.float().norm()


def mixture(logits_TE: Tensor, x_TD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor) -> Tensor:
    choice = route(logits_TE, None, 4, groups=4, top_groups=2)
    order = expert_order(choice.experts_TK, logits_TE.shape[1])
    h_RI = grouped_swiglu(x_TD, gate_up_EID, order)
    return unpermute(grouped_linear(h_RI, down_EDI, order.ends_E), order, choice.weights_TK)


def leaves() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    tokens, experts, hidden, width = 300, 16, 256, 128
    return (
        torch.randn(tokens, experts, device="cuda", requires_grad=True),
        torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_(),
        (torch.randn(experts, 2 * width, hidden, device="cuda") / 16).bfloat16().requires_grad_(),
        (torch.randn(experts, hidden, width, device="cuda") / 12).bfloat16().requires_grad_(),
    )


def test_the_host_never_waits_in_a_mixture() -> None:
    inputs = leaves()
    torch.autograd.grad(mixture(*inputs).float().square().sum(), inputs)  # kernels are compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(mixture(*inputs).float().square().sum(), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_mixture_and_one_in_a_cuda_graph() -> None:
    inputs = leaves()
    want = torch.autograd.grad(mixture(*inputs).float().square().sum(), inputs)
    compiled = torch.compile(mixture, fullgraph=True)
    have = torch.autograd.grad(compiled(*inputs).float().square().sum(), inputs)
    for a, b in zip(have, want, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured_TD = mixture(*inputs)
        inputs[1].copy_(torch.randn_like(inputs[1]))
        graph.replay()
        torch.testing.assert_close(captured_TD, mixture(*inputs))


@hopper
def test_auto_takes_the_kernels_of_a_mixture() -> None:
    logits_TE, x_TD, gate_up_EID, _ = leaves()
    order = expert_order(torch.zeros(300, 4, dtype=torch.int64, device="cuda"), 16)
    assert backend_for("expert_order", order.place_TK, 16, 1) == "triton"
    assert backend_for("permute", x_TD, order.order_R, order.place_TK) == "triton"
    assert backend_for("grouped_swiglu", x_TD, gate_up_EID, *order[:2], order.ends_E) == "triton"
    assert backend_for("grouped_linear", x_TD.float(), gate_up_EID.float(), order.ends_E) == "torch"
    assert backend_for("route", logits_TE, None, 4, "sigmoid", 1, 1, 2, True, 1.0) in ("cuda", "triton")
