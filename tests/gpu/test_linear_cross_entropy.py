"""The loss of a linear head at real sizes: memory, precision, CUDA graphs, torch.compile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepwright_kernels import backend_for, dispatch, linear_cross_entropy, weighted_linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

IGNORED = -100


def sample(tokens: int, width: int, vocabulary: int, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_TD = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, device="cuda") * 0.05).to(weight_dtype).requires_grad_()
    targets_T = torch.randint(vocabulary, (tokens,), device="cuda")
    targets_T[::7] = IGNORED
    return hidden_TD, weight_VD, targets_T


def measured(function: Callable[..., tuple[Tensor, Tensor]], *arguments: Tensor) -> tuple[list[Tensor], int]:
    """(loss, entropy and gradients; bytes taken beyond inputs and gradients)."""
    leaves = arguments[:2]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_T, entropy_T = function(*arguments)
    gradients = torch.autograd.grad(loss_T, leaves, torch.linspace(-1, 2, len(loss_T), device="cuda"))
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before - sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    return [loss_T.detach(), entropy_T, *gradients], taken


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_deepseeks_vocabulary_takes_an_eighth_of_the_logits(weight_dtype: torch.dtype) -> None:
    tokens, width, vocabulary = 16384, 2048, 129280
    arguments = sample(tokens, width, vocabulary, weight_dtype)
    assert backend_for("linear_cross_entropy", *arguments) == "triton"
    have, taken = measured(linear_cross_entropy, *arguments)
    assert taken * 8 <= tokens * vocabulary * 2
    want, _ = measured(dispatch.load("linear_cross_entropy", "torch"), *arguments)
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() / b.float().norm() < 5e-3
    again, _ = measured(linear_cross_entropy, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(have, again, strict=True))


@pytest.mark.parametrize(("tokens", "width", "vocabulary", "chunk"), [(1000, 512, 50001, None), (3000, 256, 777, 1024)])
def test_odd_sizes_and_blocks_of_tokens(tokens: int, width: int, vocabulary: int, chunk: int | None) -> None:
    arguments = sample(tokens, width, vocabulary, torch.bfloat16)
    have, _ = measured(lambda *tensors: linear_cross_entropy(*tensors, IGNORED, chunk, 0.7), *arguments)
    reference = dispatch.load("linear_cross_entropy", "reference")
    want, _ = measured(lambda *tensors: reference(*tensors, IGNORED, None, 0.7), *arguments)
    for a, b in zip(have, want, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 5e-3


def test_no_host_synchronisation_and_a_cuda_graph() -> None:
    hidden_TD, weight_VD, targets_T = sample(512, 256, 40000, torch.bfloat16)
    static_TD = hidden_TD.detach().clone().requires_grad_()

    def step() -> list[Tensor]:
        loss_T, entropy_T = linear_cross_entropy(static_TD, weight_VD, targets_T)
        return [loss_T, entropy_T, *torch.autograd.grad(loss_T.sum(), (static_TD, weight_VD))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static_TD.copy_(torch.randn_like(static_TD))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_inductor_goes_through_it_whole() -> None:
    hidden_TD, weight_VD, targets_T = sample(300, 128, 5000, torch.bfloat16)

    def mean(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_TD * 2, weight_VD, targets_T)[0].sum() / 300

    leaves = (hidden_TD, weight_VD)
    have = torch.autograd.grad(torch.compile(mean, fullgraph=True)(*leaves), leaves)
    for a, b in zip(have, torch.autograd.grad(mean(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-3)


def test_a_weighted_sum_takes_an_eighth_of_the_logits_too() -> None:
    tokens, vocabulary = 16384, 129280
    hidden_TD, weight_VD, targets_T = sample(tokens, 2048, vocabulary, torch.bfloat16)
    token_weights_T = torch.linspace(-1, 2, tokens, device="cuda")
    leaves = (hidden_TD, weight_VD)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, token_weights_T)
    have = torch.autograd.grad(loss, leaves)
    torch.cuda.synchronize()
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    taken = torch.cuda.max_memory_allocated() - before - gradients
    assert taken * 8 <= 1.001 * tokens * vocabulary * 2  # the buffer alone is an eighth
    losses_T, _ = dispatch.load("linear_cross_entropy", "torch")(hidden_TD, weight_VD, targets_T)
    want = torch.autograd.grad(losses_T, leaves, token_weights_T)
    torch.testing.assert_close(loss, losses_T @ token_weights_T, rtol=1e-4, atol=1e-3)
    for a, b in zip(have, want, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 1e-2


def test_a_weighted_sum_in_a_cuda_graph_and_through_inductor() -> None:
    hidden_TD, weight_VD, targets_T = sample(512, 256, 40000, torch.bfloat16)
    token_weights_T = torch.linspace(-1, 2, 512, device="cuda")
    leaves = (hidden_TD, weight_VD)

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return weighted_linear_cross_entropy(hidden_TD * 2, weight_VD, targets_T, token_weights_T) * 3

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*leaves), leaves)

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    want = step()
    for a, b in zip(captured, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    have = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-2)
