"""Tokens into expert order and back: a permutation, with gradients that are gathers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_moe.dispatch import permute, plan, unpermute

CHOICES = st.integers(1, 4).flatmap(
    lambda copies: st.lists(st.lists(st.integers(0, 5), min_size=copies, max_size=copies), min_size=1, max_size=12)
)


@given(CHOICES)
@settings(max_examples=100, deadline=None)
def test_every_copy_has_one_place_in_its_experts_range(choices: list[list[int]]) -> None:
    """Nothing is dropped, whatever the load: all tokens to one expert included."""
    experts_TK = torch.tensor(choices)
    dispatch = plan(experts_TK, 6)
    flat = experts_TK.flatten().tolist()
    assert sorted(dispatch.order_X.tolist()) == list(range(len(flat)))
    assert dispatch.order_X[dispatch.inverse_X].tolist() == list(range(len(flat)))
    assert dispatch.load_E.tolist() == [flat.count(e) for e in range(6)]
    assert dispatch.ends_E.tolist() == [sum(f <= e for f in flat) for e in range(6)]
    assert dispatch.ends_E.dtype == torch.int32
    placed = [flat[copy] for copy in dispatch.order_X.tolist()]
    assert placed == sorted(flat)
    for expert in range(6):
        copies = [copy for copy in dispatch.order_X.tolist() if flat[copy] == expert]
        assert copies == sorted(copies)  # stable: the tokens' order is kept


def test_there_and_back_with_weights() -> None:
    torch.manual_seed(0)
    experts_TK = torch.tensor([[2, 0], [1, 2], [2, 1]])
    x_TD, weights_TK = torch.randn(3, 4), torch.rand(3, 2)
    dispatch = plan(experts_TK, 4)
    routed = permute(x_TD, dispatch, 2)
    assert torch.equal(routed, x_TD[[0, 1, 2, 0, 1, 2]])
    scale_X = torch.tensor([1.0, 10.0, 10.0, 100.0, 100.0, 100.0])[:, None]  # expert e multiplies by 10^e
    want = x_TD * (10.0**experts_TK * weights_TK).sum(1, keepdim=True)
    torch.testing.assert_close(unpermute(routed * scale_X, dispatch, weights_TK), want)


@pytest.mark.parametrize("choices", [[[2, 0], [1, 2], [2, 1]], [[3, 1]] * 4, [[0], [0], [2]]])
def test_gradients_in_float64(choices: list[list[int]]) -> None:
    torch.manual_seed(0)
    experts_TK = torch.tensor(choices)
    tokens, copies = experts_TK.shape
    dispatch = plan(experts_TK, 4)
    x_TD = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    y_XD = torch.randn(tokens * copies, 3, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(tokens, copies, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, dispatch, copies), (x_TD,))
    assert torch.autograd.gradcheck(lambda y, w: unpermute(y, dispatch, w), (y_XD, weights_TK))
