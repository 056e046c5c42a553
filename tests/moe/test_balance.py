"""The sequence-wise balance loss against the DeepSeek-V3 report, eq. 17-20, written as loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepwright_moe.balance import sequence_balance_loss


def by_loops(scores_BSE: Tensor, top_k: int, real_BS: Tensor) -> float:
    losses = []
    for scores_SE, real_S in zip(scores_BSE.tolist(), real_BS.tolist(), strict=True):
        tokens = [scores for scores, real in zip(scores_SE, real_S, strict=True) if real]
        experts, loss = len(tokens[0]), 0.0
        for i in range(experts):
            chosen = sum(i in sorted(range(experts), key=lambda e: -scores[e])[:top_k] for scores in tokens)
            f = experts / (top_k * len(tokens)) * chosen
            p = sum(scores[i] / sum(scores) for scores in tokens) / len(tokens)
            loss += f * p
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (4, 1), (3, 3)])
def test_equals_the_loops(experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    scores_BSE = torch.rand(3, 7, experts)
    want = by_loops(scores_BSE, top_k, torch.ones(3, 7, dtype=torch.bool))
    assert float(sequence_balance_loss(scores_BSE, top_k, None)) == pytest.approx(want, rel=1e-5)


def test_padding_is_neither_token_nor_choice() -> None:
    torch.manual_seed(1)
    scores_BSE = torch.rand(3, 8, 4)
    real_BS = torch.arange(8) < torch.tensor([[8], [5], [1]])
    have = sequence_balance_loss(scores_BSE, 2, real_BS)
    assert float(have) == pytest.approx(by_loops(scores_BSE, 2, real_BS), rel=1e-5)
    elsewhere = scores_BSE.masked_fill(~real_BS[..., None], 0.9)
    torch.testing.assert_close(sequence_balance_loss(elsewhere, 2, real_BS), have)


def test_an_even_load_is_worth_one_and_a_collapse_the_number_of_experts_over_k() -> None:
    even = torch.eye(4).repeat(2, 1)[None] * 0.98 + 0.01
    assert float(sequence_balance_loss(even, 1, None)) == pytest.approx(1.0)
    collapsed = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 6, 4)
    assert float(sequence_balance_loss(collapsed, 1, None)) == pytest.approx(4.0)


def test_sequences_are_judged_one_by_one() -> None:
    """Two sequences that are lopsided in opposite ways are not balanced, though the batch is."""
    left = torch.tensor([0.9, 0.1]).expand(5, 2)
    apart = torch.stack([left, left.flip(-1)])
    mixed = torch.cat([left, left.flip(-1)])[None]
    assert float(sequence_balance_loss(apart, 1, None)) == pytest.approx(2 * 0.9)
    assert float(sequence_balance_loss(mixed, 1, None)) == pytest.approx(1.0)


def test_the_gradient_is_that_of_the_shares_with_the_frequencies_fixed() -> None:
    torch.manual_seed(2)
    scores_BSE = torch.rand(2, 6, 4, dtype=torch.float64, requires_grad=True)
    sequence_balance_loss(scores_BSE, 2, None).backward()
    fixed = scores_BSE.detach()
    chosen = torch.zeros_like(fixed).scatter(-1, fixed.topk(2).indices, 1.0)
    again = fixed.clone().requires_grad_()
    share = again / again.sum(-1, keepdim=True)
    (chosen.mean(1) * 4 / 2 * share.mean(1)).sum(-1).mean().backward()
    torch.testing.assert_close(scores_BSE.grad, again.grad)
