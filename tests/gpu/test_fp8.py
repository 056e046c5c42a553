"""FP8 on a GPU at the sizes of real models: every backend against the reference, layers in graphs and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepwright_kernels import (
    backend_for,
    configure,
    dispatch,
    fp8_grouped_feed_forward,
    fp8_grouped_linear,
    fp8_linear,
    quantise_fp8_blocks,
    quantise_fp8_columns,
    quantise_fp8_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def off(have: Tensor, want: Tensor) -> float:
    return float(((have.float() - want.float()).norm() / want.float().norm()).detach())


def meant(values: Tensor, scales: Tensor) -> Tensor:
    """What values and row scales stand for."""
    return values.float() * scales.repeat_interleave(128, 1)[:, : values.shape[1]]


def backends(operator: str, *arguments: object) -> list[str]:
    """Those that can run here, but for the reference."""
    found = []
    for backend in dispatch.operators()[operator]:
        if backend != "reference":
            with configure({operator: backend}):
                try:
                    assert backend_for(operator, *arguments) == backend
                except ValueError:
                    continue
            found.append(backend)
    assert "triton" in found
    return found


def uneven_ends(groups: int, tokens: int) -> Tensor:
    """Ends of groups of very different sizes, some of them empty, all multiples of 128 and the last below `tokens`."""
    share = torch.rand(groups) ** 4 * (torch.rand(groups) > 0.2)
    sizes = (share / share.sum() * (tokens // 128 - 1)).floor().int() * 128
    return sizes.cumsum(0).int().cuda()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(4096, 7168), (4095, 576)])
def test_quantising_gives_the_references_bits(shape: tuple[int, int], power_of_two: bool) -> None:
    torch.manual_seed(0)
    x = draw(*shape) * 10 ** draw(shape[0], 1)
    for operator in ("quantise_fp8_rows", "quantise_fp8_columns", "quantise_fp8_rows_and_columns"):
        want = dispatch.load(operator, "reference")(x, power_of_two)
        for backend in backends(operator, x, power_of_two):
            for a, b in zip(dispatch.load(operator, backend)(x, power_of_two), want, strict=True):
                assert a.stride() == b.stride() and torch.equal(a.float(), b.float())
    for transposed in (False, True):
        arguments = (torch.stack([x, -x]).float(), (128, 128), power_of_two, transposed)
        have = dispatch.load("quantise_fp8_blocks", "triton")(*arguments)
        want = dispatch.load("quantise_fp8_blocks", "reference")(*arguments)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize(("tokens", "hidden"), [(4096, 2048), (4095, 1408), (5, 128)])
def test_the_backward_pass_of_swiglu(tokens: int, hidden: int) -> None:
    """Exponentials differ in their last bits, so a value may fall to the other side of a rounding."""
    torch.manual_seed(0)
    gate_up, grad = 3 * draw(tokens, 2 * hidden), draw(tokens, hidden)
    want = dispatch.load("swiglu_backward_quantise_fp8", "reference")(grad, gate_up, False)
    for backend in backends("swiglu_backward_quantise_fp8", grad, gate_up, False):
        have = dispatch.load("swiglu_backward_quantise_fp8", backend)(grad, gate_up, False)
        assert all(a.stride() == b.stride() and a.dtype == b.dtype for a, b in zip(have, want, strict=True))
        for result in range(0, 6, 2):
            a, b = (meant(*each[result : result + 2]) for each in (have, want))
            assert off(a, b) < 0.01, (backend, result)
            assert ((a - b).abs() <= b.abs() / 4 + want[result + 1].max() * 2**-8).all(), (backend, result)


@pytest.mark.parametrize("rows", [1, 130, 4096])
@pytest.mark.parametrize(("outputs", "inner"), [(576, 7168), (2048, 1408), (32, 128), (128, 272)])
def test_dense_products(rows: int, outputs: int, inner: int) -> None:
    torch.manual_seed(0)
    a, weight = quantise_fp8_rows(draw(rows, inner)), draw(outputs, inner)
    for b, dtype in ((quantise_fp8_blocks(weight), torch.bfloat16), (quantise_fp8_rows(weight), torch.float32)):
        want = dispatch.load("fp8_matmul", "reference")(*a, *b, dtype)
        for backend in backends("fp8_matmul", *a, *b, dtype):
            have = dispatch.load("fp8_matmul", backend)(*a, *b, dtype)
            assert have.dtype == dtype and off(have, want) < 2e-3, backend


@pytest.mark.parametrize(("groups", "outputs", "inputs"), [(64, 2816, 2048), (8, 2048, 1408)])
def test_grouped_products(groups: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    ends = uneven_ends(groups, 6000)
    last = int(ends[-1])
    a, b = quantise_fp8_rows(draw(6000, inputs)), quantise_fp8_blocks(draw(groups, outputs, inputs))
    arguments = (*a, *b, ends, torch.bfloat16)
    want = dispatch.load("fp8_grouped_matmul", "reference")(*arguments)
    for backend in backends("fp8_grouped_matmul", *arguments):
        have = dispatch.load("fp8_grouped_matmul", backend)(*arguments)
        assert off(have, want) < 2e-3 and (have[last:] == 0).all(), backend
        assert torch.equal(have, dispatch.load("fp8_grouped_matmul", backend)(*arguments)), backend
    columns = (*quantise_fp8_columns(draw(6000, outputs)), *quantise_fp8_columns(draw(6000, inputs)), ends)
    want = dispatch.load("fp8_grouped_outer", "reference")(*columns, torch.float32)
    for backend in backends("fp8_grouped_outer", *columns, torch.float32):
        have = dispatch.load("fp8_grouped_outer", backend)(*columns, torch.float32)
        assert off(have, want) < 2e-3, backend
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        assert (have[empty] == 0).all(), backend


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def test_layers_give_the_references_gradients() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([128, 128, 640, 896], dtype=torch.int32, device="cuda")
    x, gate_up, down = leaves(draw(1000, 2048), draw(4, 2816, 2048, dtype=torch.float32) / 45, draw(4, 2048, 1408) / 38)
    grad = draw(1000, 2048)

    def everything() -> tuple[Tensor, ...]:
        y = fp8_grouped_feed_forward(x, gate_up, down, ends)
        z = fp8_linear(x, gate_up[0])
        return y, *torch.autograd.grad(y, (x, gate_up, down), grad), z, *torch.autograd.grad(z, (x,), draw(1000, 2816))

    torch.manual_seed(1)
    have = everything()
    torch.manual_seed(1)
    with configure({"*": "reference"}):
        want = everything()
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype and off(a, b) < 0.03


def test_a_graph_follows_new_ends_and_compiled_layers_give_the_same() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([128, 128, 640, 896], dtype=torch.int32, device="cuda")
    values, grad = (draw(1000, 512), draw(4, 768, 512, dtype=torch.float32)), draw(1000, 768)

    def step(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = fp8_grouped_linear(x, weight, ends)
        return y, *torch.autograd.grad(y, (x, weight), grad)

    x, weight = leaves(*values)
    want = step(x, weight)
    compiled = torch.compile(fp8_grouped_linear, fullgraph=True)(x, weight, ends)
    have = compiled, *torch.autograd.grad(compiled, (x, weight), grad)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))

    # Leaves of its own: where a leaf's gradient is gathered belongs to the stream that first asked for it, and a graph
    # cannot be captured across streams.
    captured_leaves = leaves(*(value.detach().clone() for value in values))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*captured_leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*captured_leaves)
    ends.copy_(torch.tensor([256, 384, 384, 512], dtype=torch.int32))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(x, weight), strict=True))
