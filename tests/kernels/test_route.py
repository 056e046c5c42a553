"""The router's reference against sorting in Python, its gradients by differences, and ties, which tests can rely on."""

from typing import Any

import pytest
import torch

from deepwright_kernels import configure, route


def by_hand(
    scores: list[float], bias: list[float], top_k: int, groups: int, top_groups: int, group_best: int
) -> list[int]:
    """The choice by sorting; Python's sort is stable, so the lowest index wins."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    worth = [sum(sorted(biased[g * size : (g + 1) * size])[-group_best:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -worth[g])[:top_groups]
    return sorted((e for e in range(len(scores)) if e // size in kept), key=lambda e: -biased[e])[:top_k]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups", "group_best"),
    [(8, 2, 1, 1, 2), (12, 4, 3, 2, 2), (12, 4, 3, 2, 1), (20, 5, 4, 1, 3), (7, 7, 1, 1, 1), (9, 2, 9, 3, 1)],
)
def test_choice_weights_scores_and_counts(
    backend: str, scoring: str, experts: int, top_k: int, groups: int, top_groups: int, group_best: int
) -> None:
    torch.manual_seed(0)
    # Multiples of a half: many ties.
    logits_TE, bias_E = (torch.randn(40, experts) * 2).round() / 2, torch.randn(experts).round() / 4
    with configure({"route": backend}):
        choice = route(
            logits_TE,
            bias_E,
            top_k,
            scoring=scoring,
            groups=groups,
            top_groups=top_groups,
            group_best=group_best,
            scaling=2.5,
        )
    want_TE = torch.sigmoid(logits_TE) if scoring == "sigmoid" else torch.softmax(logits_TE, -1)
    torch.testing.assert_close(choice.scores_TE, want_TE)
    # Sums of float32 as the operator makes them: a tie must be a tie here too.
    biased_TE = (choice.scores_TE + bias_E).tolist()
    nothing = [0.0] * experts
    want_TK = [by_hand(biased, nothing, top_k, groups, top_groups, group_best) for biased in biased_TE]
    assert choice.experts_TK.tolist() == want_TK
    chosen_TK = want_TE.gather(1, choice.experts_TK)
    torch.testing.assert_close(choice.weights_TK, 2.5 * chosen_TK / chosen_TK.sum(1, keepdim=True))
    assert choice.counts_E.tolist() == choice.experts_TK.flatten().bincount(minlength=experts).tolist()


def test_equal_scores_go_to_the_lowest_experts_of_the_lowest_groups() -> None:
    choice = route(torch.zeros(2, 12), None, 3, groups=4, top_groups=2)
    assert choice.experts_TK.tolist() == [[0, 1, 2]] * 2


def test_weights_are_raw_scores_without_normalisation() -> None:
    logits_TE = torch.tensor([[0.0, 2.0, -1.0]])
    choice = route(logits_TE, torch.tensor([0.0, -9.0, 0.0]), 2, normalise=False, scaling=3.0)
    assert choice.experts_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(choice.weights_TK, 3 * torch.sigmoid(logits_TE[:, [0, 2]]))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_in_float64(scoring: str, normalise: bool) -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def differentiable(logits_TE: torch.Tensor) -> Any:
        choice = route(logits_TE, None, 2, scoring=scoring, normalise=normalise, scaling=1.5)
        return choice.weights_TK, choice.scores_TE

    assert torch.autograd.gradcheck(differentiable, (logits_TE,))


def test_errors_name_the_argument() -> None:
    logits_TE = torch.zeros(2, 8)
    for arguments, options, problem in [
        ((logits_TE.bfloat16(), None, 2), {}, "logits_TE is bfloat16; expected one of float32"),
        ((logits_TE[0], None, 2), {}, r"logits_TE has shape \[8\]; expected \[T, E\]"),
        ((logits_TE, torch.zeros(7), 2), {}, r"bias_E has shape \[7\]; expected \[E\] = \[8\]"),
        ((logits_TE, None, 9), {}, "top_k is 9; expected 1 to the 8 experts"),
        ((logits_TE, None, 3), {"groups": 4}, "top_k is 3; expected 1 to the 2 experts"),
        ((logits_TE, None, 2), {"groups": 3}, "groups is 3; expected a divisor of 8 experts"),
        ((logits_TE, None, 2), {"groups": 4, "top_groups": 5}, "top_groups is 5; expected 1 to groups, which is 4"),
        ((logits_TE, None, 2), {"groups": 4, "group_best": 3}, "group_best is 3; expected 1 to the 2 experts"),
        ((logits_TE, None, 2), {"scoring": "tanh"}, "scoring is 'tanh'; expected one of sigmoid, softmax"),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"route: {problem}"):
            route(*arguments, **options)
