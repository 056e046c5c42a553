"""The router: kernel against reference, ties and ungainly sizes included."""

import pytest
import torch

from deepwright_kernels import dispatch, expert_order, permute, route, unpermute

from .sides import DEVICE, draw

SHAPES = [
    # tokens, experts, top_k, groups, top_groups, group_best, scoring, normalise, bias
    (5, 8, 2, 1, 1, 2, "sigmoid", True, True),
    (17, 12, 3, 3, 2, 2, "sigmoid", True, True),
    (9, 20, 4, 4, 2, 1, "softmax", False, False),
    (3, 256, 8, 8, 4, 2, "sigmoid", True, True),
    (2, 384, 8, 1, 1, 2, "softmax", True, True),
    (1, 6, 6, 1, 1, 1, "sigmoid", False, False),
    (0, 4, 2, 1, 1, 2, "sigmoid", True, True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route(shape: tuple) -> None:
    tokens, experts, top_k, groups, top_groups, group_best, scoring, normalise, biased = shape
    logits_TE = draw(tokens, experts)
    logits_TE[: tokens // 2] = (logits_TE[: tokens // 2] * 2).round() / 2  # ties
    logits_TE.requires_grad_()
    bias_E = draw(experts).round() / 8 if biased else None
    arguments = (logits_TE, bias_E, top_k, scoring, groups, top_groups, group_best, normalise, 2.5)
    upstream = (draw(tokens, top_k), draw(tokens, experts))
    sides = []
    for backend in ("reference", "triton"):
        experts_TK, weights_TK, scores_TE, counts_E = dispatch.load("route", backend)(*arguments)
        gradient = torch.autograd.grad((weights_TK, scores_TE), logits_TE, upstream)
        sides.append((experts_TK, weights_TK, scores_TE, counts_E, *gradient))
    want, have = sides
    assert torch.equal(have[0], want[0]) and torch.equal(have[3], want[3])
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_huge_logits_and_gradients_of_one_output_alone() -> None:
    logits_TE = (draw(4, 10) * 1e4).requires_grad_()
    for output in (1, 2):
        sides = []
        for backend in ("reference", "triton"):
            results = dispatch.load("route", backend)(logits_TE, None, 3, "softmax", 1, 1, 1, True, 1.0)
            sides.append(torch.autograd.grad(results[output].sum(), logits_TE)[0])
        torch.testing.assert_close(sides[1], sides[0])


def test_route_keeps_torchs_rules() -> None:
    dispatch.load("route", "triton")  # registers the operators
    arguments = (draw(3, 8, grad=True), draw(8), 2, True, 2, 1, 2, True, 1.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.deepwright.route.default, arguments, test_utils=tests)


def test_a_compiled_graph_goes_through_a_whole_mixture() -> None:
    logits_TE, x_TD = draw(5, 8, grad=True), draw(5, 6, grad=True)

    def mixture(logits_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        choice = route(logits_TE, None, 2, groups=2, top_groups=1)
        order = expert_order(choice.experts_TK, 8, 4)
        return unpermute(permute(x_TD, order).sin(), order, choice.weights_TK).square().sum()

    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    leaves = (logits_TE, x_TD)
    for have, want in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(mixture(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(have, want)


def test_equal_scores_go_to_the_lowest_experts_every_time() -> None:
    logits_TE = torch.zeros(3, 12, device=DEVICE)
    assert route(logits_TE, None, 3, groups=4, top_groups=2).experts_TK.tolist() == [[0, 1, 2]] * 3
