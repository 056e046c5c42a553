"""DeepSeek-V2's router against its report, section 2.2: what differs from V3's, and each way to mix the two up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_moe.routing import Routing
from deepwright_moe.softmax_router import SoftmaxRouterConfig, SoftmaxTopKRouter, build_softmax_router


def build(experts: int, top_k: int, **options: Any) -> SoftmaxTopKRouter:
    """A router that passes its input on as logits, so that a test can say every score."""
    router = build_softmax_router(SoftmaxRouterConfig(**options), experts, experts, top_k)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router


def route(router: SoftmaxTopKRouter, scores: list[float]) -> Routing:
    """Route one token whose softmax scores are these (they add up to 1)."""
    return router(torch.tensor([scores], dtype=torch.float64).log().float())


def weight_of(routing: Routing) -> dict[int, float]:
    return dict(zip(routing.experts_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True))


def by_hand(scores: list[float], top_k: int, groups: int, top_groups: int) -> set[int]:
    """The choice, written with sorting."""
    size = len(scores) // groups
    best = [max(scores[g * size : (g + 1) * size]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -best[g])[:top_groups]
    return set(sorted((e for e in range(len(scores)) if e // size in kept), key=lambda e: -scores[e])[:top_k])


def test_weights_are_the_softmax_of_all_experts_times_the_scaling() -> None:
    """Not of the chosen ones: what the others have is missing from the sum."""
    routing = route(build(4, 2, scaling=16.0), [0.4, 0.3, 0.2, 0.1])
    assert weight_of(routing) == pytest.approx({0: 16 * 0.4, 1: 16 * 0.3})
    torch.testing.assert_close(routing.scores_TE, torch.tensor([[0.4, 0.3, 0.2, 0.1]]))


def test_normalised_weights_are_scaled_too() -> None:
    routing = route(build(4, 2, normalise=True, scaling=2.0), [0.4, 0.3, 0.2, 0.1])
    assert weight_of(routing) == pytest.approx({0: 2 * 0.4 / 0.7, 1: 2 * 0.3 / 0.7})


def test_a_group_is_worth_its_best_expert_and_not_its_two_best() -> None:
    # The first group has the best expert, the second the best two together.
    scores = [0.3, 0.03, 0.02, 0.25, 0.24, 0.16]
    assert set(weight_of(route(build(6, 2, groups=2, top_groups=1), scores))) == {0, 1}
    assert set(weight_of(route(build(6, 2), scores))) == {0, 3}


def test_experts_of_dropped_groups_get_no_token_however_small_the_others_are() -> None:
    """Scores of kept experts may underflow to 0; a dropped expert at 0 would then be as good."""
    router = build(6, 3, groups=2, top_groups=1)
    routing = router(torch.tensor([[0.0, -200.0, -200.0, -1.0, -1.0, -1.0]]))
    assert set(routing.experts_TK[0].tolist()) == {0, 1, 2}


def test_scores_are_float32_whatever_the_precision() -> None:
    torch.manual_seed(0)
    router = build_softmax_router(SoftmaxRouterConfig(groups=4, top_groups=2), 16, 16, 4)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(5, 16)
    want = (x_TD.double() @ router.weight.double().T).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.scores_TE.double(), want, atol=1e-6, rtol=1e-5)


@given(st.data(), st.sampled_from([(8, 2, 1, 1), (8, 3, 4, 2), (12, 4, 3, 2), (8, 2, 2, 1), (8, 3, 8, 3)]))
@settings(max_examples=200, deadline=None)
def test_any_choice_is_the_one_by_sorting(data: st.DataObject, shape: tuple[int, int, int, int]) -> None:
    experts, top_k, groups, top_groups = shape
    parts = data.draw(st.lists(st.integers(1, 10**6), min_size=experts, max_size=experts))
    scores = [part / sum(parts) for part in parts]
    # Which of two equals wins is nobody's promise.
    if any(b - a < 1e-6 for a, b in pairwise(sorted(scores))):
        return
    router = build(experts, top_k, groups=groups, top_groups=top_groups)
    assert set(weight_of(route(router, scores))) == by_hand(scores, top_k, groups, top_groups)


def test_every_score_has_a_gradient_through_a_chosen_weight() -> None:
    """A softmax ties all of them together; V3's sigmoids are apart."""
    logits = torch.tensor([[0.3, 0.2, 0.1, -0.4]], requires_grad=True)
    routing = build(4, 2)(logits)
    routing.weights_TK.sum().backward()
    s = logits.detach().softmax(-1)[0]
    chosen = torch.tensor([1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(logits.grad[0], s * (chosen - (s * chosen).sum()))


def test_there_is_no_bias_and_nothing_to_balance() -> None:
    router = build(4, 2)
    assert list(router.state_dict()) == ["weight"]
    before = router.weight.clone()
    router.balance(torch.tensor([9, 0, 0, 0]))
    assert torch.equal(router.weight, before)
