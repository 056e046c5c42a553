"""Tokens into expert order and back, against loops: every copy has a place, gaps are empty, gradients are gathers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_kernels import ExpertOrder, configure, dispatch, expert_order, permute, unpermute

CHOICES = st.integers(1, 4).flatmap(
    lambda copies: st.lists(st.lists(st.integers(0, 5), min_size=copies, max_size=copies), min_size=1, max_size=12)
)
BACKENDS = ["reference", "torch"]


@given(CHOICES, st.sampled_from([1, 2, 8]))
@settings(max_examples=100, deadline=None)
def test_every_copy_has_one_place_in_its_experts_range(choices: list[list[int]], alignment: int) -> None:
    """Nothing is dropped, whatever the load: all tokens to one expert included."""
    order = expert_order(torch.tensor(choices), 6, alignment)
    flat = [expert for chosen in choices for expert in chosen]
    counts = [flat.count(expert) for expert in range(6)]
    lengths = [-(-count // alignment) * alignment for count in counts]
    rows = []
    for expert, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        rows += [copy for copy, chosen in enumerate(flat) if chosen == expert] + [-1] * (length - count)
    assert order.counts_E.tolist() == counts
    assert order.ends_E.tolist() == [sum(lengths[: expert + 1]) for expert in range(6)]
    assert order.ends_E.dtype == order.order_R.dtype == order.place_TK.dtype == torch.int32
    bound = (len(flat) + 6 * (alignment - 1)) // alignment * alignment
    assert order.order_R.tolist() == rows + [-1] * (bound - len(rows))
    assert order.order_R[order.place_TK.flatten().long()].tolist() == list(range(len(flat)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", [1, 4])
def test_there_and_back_with_weights(backend: str, alignment: int) -> None:
    torch.manual_seed(0)
    experts_TK = torch.tensor([[2, 0], [1, 2], [2, 1]])
    x_TD, weights_TK = torch.randn(3, 4), torch.rand(3, 2)
    order = expert_order(experts_TK, 4, alignment)
    with configure({"permute": backend, "unpermute": backend}):
        routed = permute(x_TD, order)
        expert_R = torch.repeat_interleave(torch.arange(4), order.ends_E.diff(prepend=torch.zeros(1)).int())
        for row, copy in enumerate(order.order_R.tolist()):
            assert torch.equal(routed[row], x_TD[copy // 2] if copy >= 0 else torch.zeros(4))
        scale_R = torch.cat([10.0**expert_R, torch.ones(len(routed) - len(expert_R))])  # expert e multiplies by 10^e
        want = x_TD * (10.0**experts_TK * weights_TK).sum(1, keepdim=True)
        torch.testing.assert_close(unpermute(routed * scale_R[:, None], order, weights_TK), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choices", [[[2, 0], [1, 2], [2, 1]], [[3, 1]] * 4, [[0], [0], [2]]])
def test_gradients_in_float64(backend: str, choices: list[list[int]]) -> None:
    torch.manual_seed(0)
    experts_TK = torch.tensor(choices)
    order = expert_order(experts_TK, 4, 2)
    x_TD = torch.randn(len(choices), 3, dtype=torch.float64, requires_grad=True)
    y_RD = torch.randn(len(order.order_R), 3, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(experts_TK.shape, dtype=torch.float64, requires_grad=True)
    with configure({"permute": backend, "unpermute": backend}):
        assert torch.autograd.gradcheck(lambda x: permute(x, order), (x_TD,))
        assert torch.autograd.gradcheck(lambda y, w: unpermute(y, order, w), (y_RD, weights_TK))


def test_the_sum_is_made_in_float32() -> None:
    """In bfloat16, 256 + 1 is 256."""
    order = expert_order(torch.zeros(1, 3, dtype=torch.int64), 1)
    y_RD = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    for backend in BACKENDS:
        out = dispatch.load("unpermute", backend)(y_RD, order.order_R, order.place_TK, torch.ones(1, 3))
        assert out.item() == 258


def test_no_tokens() -> None:
    order = expert_order(torch.zeros(0, 2, dtype=torch.int64), 3, 4)
    assert order.ends_E.tolist() == [0, 0, 0] and order.order_R.tolist() == [-1] * 8
    for backend in BACKENDS:
        with configure({"permute": backend, "unpermute": backend}):
            assert permute(torch.ones(0, 5), order).tolist() == [[0.0] * 5] * 8
            assert unpermute(torch.ones(8, 5), order, torch.ones(0, 2)).shape == (0, 5)


def test_errors_name_the_argument() -> None:
    experts_TK = torch.zeros(2, 3, dtype=torch.int64)
    order: ExpertOrder = expert_order(experts_TK, 4)
    with pytest.raises(TypeError, match="experts_TK is float32; expected one of int32, int64"):
        expert_order(experts_TK.float(), 4)
    with pytest.raises(ValueError, match="alignment is 3; expected a power of two"):
        expert_order(experts_TK, 4, 3)
    with pytest.raises(ValueError, match="experts is 0; expected at least 1"):
        expert_order(experts_TK, 0)
    with pytest.raises(ValueError, match=r"permute: x_TD has shape \[3, 5\]; expected \[T, D\] = \[2, any\]"):
        permute(torch.ones(3, 5), order)
    with pytest.raises(ValueError, match=r"unpermute: y_RD has shape \[5, 5\]; expected \[R, D\] = \[6, any\]"):
        unpermute(torch.ones(5, 5), order, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"weights_TK has shape \[2, 2\]; expected \[T, K\] = \[2, 3\]"):
        unpermute(torch.ones(6, 5), order, torch.ones(2, 2))
