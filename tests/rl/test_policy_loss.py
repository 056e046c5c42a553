"""The clipped objective and the KL estimate: values and gradients by hand (DeepSeekMath, eq. 3 and 4)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.registry import Registry
from deepwright_rl.policy_loss import PolicyBatch, PolicyLoss, k3, token_weights


def build(registry: Registry, **options: Any) -> PolicyLoss:
    return registry.build("policy_loss", {"name": "clipped", "kl_coefficient": 0.0, **options})


def one_token(ratio: float, advantage: float, reference: float | None = None) -> PolicyBatch:
    """A batch of one token whose importance ratio is this; the gradient goes to its log-probability."""
    logp = torch.tensor([[-1.0]], requires_grad=True)
    old = torch.tensor([[-1.0 - math.log(ratio)]])
    return PolicyBatch(
        logp,
        old,
        None if reference is None else torch.tensor([[reference]]),
        torch.tensor([advantage]),
        torch.tensor([[True]]),
        torch.ones(1, 1),
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "clipped"),
    [
        (1.0, 2.0, 2.0, False),
        (1.1, 2.0, 2.2, False),
        (1.5, 2.0, 1.28 * 2.0, True),  # enough: no reward for going further
        (0.5, 2.0, 0.5 * 2.0, False),  # a good token became rarer: pulled back, however far
        (1.0, -2.0, -2.0, False),
        (0.9, -2.0, -1.8, False),
        (0.5, -2.0, 0.8 * -2.0, True),  # a bad token is rare enough
        (1.5, -2.0, 1.5 * -2.0, False),  # a bad token became more frequent: pushed down, however far
        (3.0, 0.0, 0.0, False),
    ],
)
def test_both_signs_on_both_sides_of_both_clips(
    registry: Registry, ratio: float, advantage: float, gain: float, clipped: bool
) -> None:
    batch = one_token(ratio, advantage)
    terms = build(registry, epsilon_low=0.2, epsilon_high=0.28)(batch)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(-gain, rel=1e-5)
    assert int(terms.clipped) == clipped
    # d ratio / d logp = ratio; nothing where the clip is in force.
    assert batch.logp_BS.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage, rel=1e-5)


@pytest.mark.parametrize("difference", [-1.5, -0.1, 0.0, 0.3, 2.0])
def test_k3_and_its_gradient_by_hand(difference: float) -> None:
    logp = torch.tensor([-2.0], requires_grad=True)
    value = k3(logp, torch.tensor([-2.0 + difference]))
    value.sum().backward()
    assert value.item() == pytest.approx(math.exp(difference) - difference - 1, abs=1e-6)
    assert logp.grad.item() == pytest.approx(1 - math.exp(difference), abs=1e-6)
    assert value.item() >= 0


def test_k3_is_the_kl_divergence_on_average() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 12, dtype=torch.float64).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3(policy, reference)).sum(), divergence)


def test_policies_far_apart_do_not_overflow(registry: Registry) -> None:
    logp = torch.tensor([[-300.0, -0.0]], requires_grad=True)
    other = torch.tensor([[-0.0, -300.0]])
    ones = torch.ones(1, 2)
    batch = PolicyBatch(logp, other, other, torch.tensor([-1.0]), ones.bool(), ones)
    loss = build(registry, kl_coefficient=1.0)(batch).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()


def test_the_penalty_is_in_the_loss_with_its_coefficient(registry: Registry) -> None:
    batch = one_token(1.0, 0.5, reference=-1.7)
    loss = build(registry, kl_coefficient=0.25)(batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 + 0.25 * (math.exp(-0.7) + 0.7 - 1))
    assert batch.logp_BS.grad.item() == pytest.approx(-0.5 + 0.25 * (1 - math.exp(-0.7)))
    without = build(registry, kl_coefficient=0.0)(one_token(1.0, 0.5, reference=-1.7)).loss
    no_reference = build(registry, kl_coefficient=0.25)(one_token(1.0, 0.5)).loss
    assert without.item() == no_reference.item() == pytest.approx(-0.5)


# What a token weighs --------------------------------------------------------------------------------

MASK = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("aggregation", "shares"),
    [
        ("sequence", [1 / 3 / 4, 1 / 3 / 1, 1 / 3 / 2]),
        ("token", [1 / 7, 1 / 7, 1 / 7]),
        ("constant", [1 / 3 / 10, 1 / 3 / 10, 1 / 3 / 10]),
    ],
)
def test_weights_by_hand(aggregation: Any, shares: list[float]) -> None:
    have = token_weights(MASK, aggregation, samples=3, tokens=7, longest=10)
    torch.testing.assert_close(have, MASK * torch.tensor(shares)[:, None])


def random_batch(rows: Tensor, aggregation: Any, logp_BS: Tensor) -> PolicyBatch:
    """Rows of one fixed batch, as a micro-batch: its padding is cut to the longest of its rows."""
    torch.manual_seed(0)
    old, reference, advantages = torch.randn(3, 5) - 2, torch.randn(3, 5) - 2, torch.randn(3)
    size = int(MASK[rows].nonzero()[:, 1].max()) + 1
    weights = token_weights(MASK[rows, :size], aggregation, samples=3, tokens=7, longest=10)
    return PolicyBatch(
        logp_BS[rows, :size], old[rows, :size], reference[rows, :size], advantages[rows], MASK[rows, :size], weights
    )


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_splitting_the_batch_changes_nothing(registry: Registry, aggregation: str) -> None:
    loss = build(registry, aggregation=aggregation, kl_coefficient=0.1)
    results = []
    for parts in ([[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]):
        logp_BS = (torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) - 2).requires_grad_()
        terms = [loss(random_batch(torch.tensor(rows), aggregation, logp_BS)) for rows in parts]
        total = torch.stack([t.loss for t in terms]).sum()
        total.backward()
        results.append((total.detach(), logp_BS.grad, sum(int(t.clipped) for t in terms)))
    for total, gradient, clipped in results[1:]:
        torch.testing.assert_close(total, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
        assert clipped == results[0][2]
    assert results[0][1][~MASK].abs().max() == 0 and (results[0][1][MASK] != 0).any()


def test_only_masked_tokens_are_counted_as_clipped(registry: Registry) -> None:
    far = torch.full((3, 5), 5.0)
    weights = token_weights(MASK, "token", 3, 7, 10)
    batch = PolicyBatch(far, torch.zeros(3, 5), None, torch.ones(3), MASK, weights)
    assert int(build(registry)(batch).clipped) == 7
