"""The router on a GPU at the sizes of V3, Kimi K2 and V2: every backend against the reference."""

import pytest
import torch

from deepwright_kernels import backend_for, configure, dispatch, route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]
SHAPES = [
    # tokens, experts, top_k, groups, top_groups, group_best, scoring, normalise, bias
    (3000, 256, 8, 8, 4, 2, "sigmoid", True, True),
    (128, 256, 8, 8, 4, 2, "sigmoid", True, True),
    (16384, 384, 8, 1, 1, 2, "sigmoid", True, True),
    (257, 160, 6, 8, 3, 1, "softmax", False, False),
    (1, 64, 6, 1, 1, 1, "softmax", False, False),
]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route(backend: str, shape: tuple) -> None:
    tokens, experts, top_k, groups, top_groups, group_best, scoring, normalise, biased = shape
    torch.manual_seed(0)
    logits_TE = torch.randn(tokens, experts, device="cuda")
    logits_TE[: tokens // 2] = (logits_TE[: tokens // 2] * 2).round() / 2  # ties
    logits_TE[-1] = 0.0  # nothing but ties
    logits_TE.requires_grad_()
    bias_E = torch.randn(experts, device="cuda").round() / 8 if biased else None
    arguments = (logits_TE, bias_E, top_k, scoring, groups, top_groups, group_best, normalise, 2.5)
    with configure({"route": backend}):
        assert backend_for("route", *arguments) == backend
    upstream = (torch.randn(tokens, top_k, device="cuda"), torch.randn(tokens, experts, device="cuda"))
    sides = []
    for name in ("reference", backend):
        experts_TK, weights_TK, scores_TE, counts_E = dispatch.load("route", name)(*arguments)
        (gradient,) = torch.autograd.grad((weights_TK, scores_TE), logits_TE, upstream)
        sides.append((experts_TK, weights_TK, scores_TE, counts_E, gradient))
    want, have = sides
    # Exponentials differ in the last bit between a compiler and torch, and with them a choice between near equals.
    same_T = (have[0] == want[0]).all(1)
    assert (~same_T).sum() <= max(1, tokens // 100)
    assert torch.equal(have[3], have[0].flatten().bincount(minlength=experts))
    for a, b in ((have[1][same_T], want[1][same_T]), (have[2], want[2]), (have[4][same_T], want[4][same_T])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    again = dispatch.load("route", backend)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(again, have, strict=False))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_logits_that_are_no_numbers_still_choose_experts_that_exist(backend: str) -> None:
    logits_TE = torch.full((300, 256), float("nan"), device="cuda")
    with configure({"route": backend}):
        choice = route(logits_TE, None, 8, groups=8, top_groups=4)
    assert choice.experts_TK.min() >= 0 and choice.experts_TK.max() < 256
    assert choice.counts_E.sum() == 300 * 8


@pytest.mark.parametrize("tokens", [64, 300])
def test_a_cuda_graph_replays_the_router(tokens: int) -> None:
    logits_TE, bias_E = torch.randn(tokens, 256, device="cuda"), torch.zeros(256, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        return tuple(route(logits_TE, bias_E, 8, groups=8, top_groups=4))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    logits_TE.copy_(torch.randn_like(logits_TE))
    graph.replay()
    graph.replay()  # counts start from zero each time
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_counts_start_from_zero_in_every_call() -> None:
    logits_TE = torch.randn(300, 256, device="cuda")
    counts = [route(logits_TE, None, 8).counts_E for _ in range(150)]
    assert all(int(count_E.sum()) == 300 * 8 for count_E in counts)


@pytest.mark.parametrize("experts", [64, 256])
def test_many_candidates_and_few_of_them_in_neighbouring_rows(experts: int) -> None:
    """Rows with 9 to 40 experts close to the best beside rows with eight: what one row leaves is not another's."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(4096, experts, generator=generator)
    close = torch.randint(9, 41, (4096, 1), generator=generator) * (torch.rand(4096, 1, generator=generator) < 0.5)
    rank_TE = torch.rand(4096, experts, generator=generator).argsort(1)
    logits_TE = torch.where(rank_TE < close, 3.0 + 0.001 * rank_TE, logits_TE).cuda()
    choices = []
    for backend in ("reference", "cuda"):
        with configure({"route": backend}):
            choices.append(route(logits_TE, None, 8))
    want, have = choices
    assert (have.experts_TK != want.experts_TK).any(1).sum() <= 40
    assert torch.equal(have.counts_E, have.experts_TK.flatten().bincount(minlength=experts))
