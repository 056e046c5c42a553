"""The router against the DeepSeek-V3 report, eq. 12-16, with one test for each known way to get it wrong."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepwright_moe.router import BiasedTopKRouter, RouterConfig, build_router
from deepwright_moe.routing import Routing


def build(experts: int, top_k: int, bias: list[float] | None = None, **options: Any) -> BiasedTopKRouter:
    """A router that passes its input on as logits, so that a test can say every score."""
    router = build_router(RouterConfig(**options), experts, experts, top_k)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        if bias is not None:
            router.bias_E.copy_(torch.tensor(bias))
    return router


def route(router: BiasedTopKRouter, scores: list[float]) -> Routing:
    """Route one token whose sigmoid scores are these."""
    return router(torch.tensor([scores], dtype=torch.float64).logit().float())


def chosen(routing: Routing) -> set[int]:
    return set(routing.experts_TK[0].tolist())


def weight_of(routing: Routing) -> dict[int, float]:
    return dict(zip(routing.experts_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True))


def by_hand(scores: list[float], bias: list[float], top_k: int, groups: int, top_groups: int) -> set[int]:
    """The choice, written with sorting."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    allowed = list(range(len(scores)))
    if groups > 1:
        best_two = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -best_two[g])[:top_groups]
        allowed = [e for e in allowed if e // size in kept]
    return set(sorted(allowed, key=lambda e: -biased[e])[:top_k])


def test_trap_1_scores_are_sigmoids_in_float32_whatever_the_precision() -> None:
    torch.manual_seed(0)
    router = build_router(RouterConfig(), 16, 4, 2)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(5, 16)
    want = torch.sigmoid(x_TD.double() @ router.weight.double().T)
    torch.testing.assert_close(router(x_TD).scores_TE.double(), want, atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.scores_TE.double(), want, atol=1e-6, rtol=1e-6)


def test_trap_1_the_bias_chooses_and_never_weights() -> None:
    scores = [0.9, 0.8, 0.1, 0.2]
    plain = route(build(4, 2), scores)
    assert chosen(plain) == {0, 1}
    pushed = route(build(4, 2, bias=[0.0, -0.75, 0.0, 0.0]), scores)
    assert chosen(pushed) == {0, 3}
    assert weight_of(pushed) == pytest.approx({0: 0.9 / 1.1, 3: 0.2 / 1.1})
    same_choice = route(build(4, 2, bias=[5.0, -0.1, 0.0, 0.0]), scores)
    assert weight_of(same_choice) == pytest.approx(weight_of(plain))
    torch.testing.assert_close(pushed.scores_TE, torch.tensor([scores]))


def test_trap_2_a_group_is_worth_its_two_best_and_not_its_best_or_its_sum() -> None:
    # Group 0 has the best expert, group 2 the largest sum, group 1 the two best together.
    scores = [0.9, 0.1, 0.1, 0.6, 0.59, 0.05, 0.5, 0.5, 0.49]
    router = build(9, 2, groups=3, top_groups=1)
    assert chosen(route(router, scores)) == {3, 4}


def test_trap_2_the_groups_are_chosen_with_the_bias_too() -> None:
    scores, bias = [0.5, 0.5, 0.4, 0.4], [-0.3, 0.0, 0.0, 0.0]
    assert chosen(route(build(4, 2, groups=2, top_groups=1), scores)) == {0, 1}
    assert chosen(route(build(4, 2, bias, groups=2, top_groups=1), scores)) == {2, 3}


def test_trap_2_dropped_groups_are_minus_infinity_and_not_zero() -> None:
    """Every kept expert's biased score is negative: at 0 a dropped expert would win."""
    scores = [0.30, 0.29, 0.28, 0.20, 0.10, 0.10]
    bias = [-0.5, -0.5, -0.5, -0.9, -0.9, -0.9]
    routing = route(build(6, 3, bias, groups=2, top_groups=1), scores)
    assert chosen(routing) == {0, 1, 2}
    assert weight_of(routing) == pytest.approx({e: scores[e] / 0.87 for e in range(3)})


def test_trap_3_weights_are_normalised_unbiased_scores_times_the_scaling() -> None:
    scores = [0.6, 0.3, 0.2, 0.1]
    assert weight_of(route(build(4, 2, scaling=2.5), scores)) == pytest.approx({0: 2.5 * 0.6 / 0.9, 1: 2.5 * 0.3 / 0.9})
    raw = route(build(4, 2, normalise=False, scaling=2.5), scores)
    assert weight_of(raw) == pytest.approx({0: 2.5 * 0.6, 1: 2.5 * 0.3})


def test_trap_3_the_divisor_is_never_zero() -> None:
    weights = build(4, 2)(torch.full((1, 4), -200.0)).weights_TK  # sigmoid underflows to 0 in float32
    assert weights.tolist() == [[0.0, 0.0]]


def test_weights_have_a_gradient_through_every_chosen_score_and_through_no_other() -> None:
    router = build(4, 2, bias=[0.0, 0.0, 1.0, 0.0])
    logits = torch.tensor([[0.3, 0.2, 0.1, -0.4]], requires_grad=True)
    routing = router(logits)
    assert chosen(routing) == {0, 2}
    place = routing.experts_TK[0].tolist().index(0)
    routing.weights_TK[0, place].backward()
    s, t = 1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(-0.1))
    want = [t / (s + t) ** 2 * s * (1 - s), 0.0, -s / (s + t) ** 2 * t * (1 - t), 0.0]
    torch.testing.assert_close(logits.grad, torch.tensor([want]))


def test_softmax_scoring() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = build(4, 2, scoring="softmax", normalise=False)(logits)
    torch.testing.assert_close(routing.scores_TE, logits.softmax(-1))
    assert weight_of(routing) == pytest.approx({0: logits.softmax(-1)[0, 0].item(), 1: logits.softmax(-1)[0, 1].item()})


SCORE = st.integers(1, 999).map(lambda n: n / 1000)
BIAS = st.integers(-1500, 1500).map(lambda n: n / 1000)


@given(st.data(), st.sampled_from([(8, 2, 1, 1), (8, 3, 4, 2), (12, 4, 3, 2), (8, 2, 2, 1)]))
@settings(max_examples=200, deadline=None)
def test_any_choice_is_the_one_by_sorting(data: st.DataObject, shape: tuple[int, int, int, int]) -> None:
    experts, top_k, groups, top_groups = shape
    scores = data.draw(st.lists(SCORE, min_size=experts, max_size=experts))
    bias = data.draw(st.lists(BIAS, min_size=experts, max_size=experts))
    size = experts // groups
    # No near ties, neither between experts nor between groups: which of two equals wins is nobody's promise.
    biased = sorted(s + b for s, b in zip(scores, bias, strict=True))
    sums = sorted(sum(sorted(scores[e] + bias[e] for e in range(g * size, (g + 1) * size))[-2:]) for g in range(groups))
    if any(b - a < 1e-4 for values in (biased, sums) for a, b in pairwise(values)):
        return
    router = build(experts, top_k, bias, groups=groups, top_groups=top_groups)
    assert chosen(route(router, scores)) == by_hand(scores, bias, top_k, groups, top_groups)


def test_routing_is_deterministic() -> None:
    torch.manual_seed(0)
    router = build_router(RouterConfig(groups=4, top_groups=2), 16, 16, 4)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(200, 16).repeat(2, 1)
    x_TD[7] = 0.0  # all scores equal: ties are broken the same way each time
    x_TD[207] = 0.0
    first, second = router(x_TD), router(x_TD)
    assert torch.equal(first.experts_TK, second.experts_TK)
    assert torch.equal(first.experts_TK[:200], first.experts_TK[200:])
    for row in first.experts_TK.tolist():
        assert len(set(row)) == 4


def test_the_bias_moves_by_the_sign_of_the_missing_load() -> None:
    router = build(4, 2, bias=[0.1, 0.0, -0.2, 0.0], bias_update_speed=0.01)
    router.balance(torch.tensor([5, 1, 3, 3]))  # mean 3
    torch.testing.assert_close(router.bias_E, torch.tensor([0.09, 0.01, -0.2, 0.0]))
    router.balance(torch.tensor([1000, 0, 0, 0]))  # how far does not matter, only the sign
    torch.testing.assert_close(router.bias_E, torch.tensor([0.08, 0.02, -0.19, 0.01]))


def test_no_speed_no_movement() -> None:
    router = build(4, 2, bias_update_speed=0.0)
    router.balance(torch.tensor([9, 0, 0, 0]))
    assert router.bias_E.tolist() == [0.0] * 4


def test_trap_1_the_bias_is_a_buffer_that_is_saved_and_not_a_parameter() -> None:
    router = build(4, 2, bias=[1.0, 2.0, 3.0, 4.0])
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.state_dict()["bias_E"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_trap_1_the_bias_stays_float32_in_a_narrower_model() -> None:
    """0.5 + 0.001 is 0.5 in bfloat16: the bias would never move again."""
    router = build(4, 2, bias=[0.5, 0.5, 0.5, 0.5]).to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    router.balance(torch.tensor([4, 0, 0, 0]))
    torch.testing.assert_close(router.bias_E, torch.tensor([0.499, 0.501, 0.501, 0.501]))


def test_balancing_evens_a_lopsided_router() -> None:
    """The mechanism end to end: tokens that nearly all prefer two of four experts are spread by a hundred updates."""
    torch.manual_seed(0)
    router = build(4, 2, bias_update_speed=0.01)
    x_TD = torch.randn(256, 4) * 0.3 + torch.tensor([1.0, 0.9, -0.5, -0.6])

    def load() -> Tensor:
        return torch.bincount(router(x_TD).experts_TK.flatten(), minlength=4)

    assert load().max() > 1.8 * load().float().mean()
    for _ in range(100):
        router.balance(load())
    assert load().max() < 1.2 * load().float().mean()
