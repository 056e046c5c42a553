"""The first half of the experts, token by token, its gradients, and what is refused."""

import pytest
import torch

from deepwright_kernels import configure, expert_order, grouped_swiglu

BACKENDS = ["reference", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", [1, 4])
def test_every_row_is_its_tokens_by_its_experts_weights(backend: str, alignment: int) -> None:
    torch.manual_seed(0)
    experts_TK = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    order = expert_order(experts_TK, 4, alignment)
    x_TD, gate_up_EID = torch.randn(4, 8), torch.randn(4, 2 * 5, 8)
    with configure({"*": backend}):
        h_RI = grouped_swiglu(x_TD, gate_up_EID, order)
    for token, chosen in enumerate(experts_TK.tolist()):
        for k, expert in enumerate(chosen):
            gate, up = gate_up_EID[expert, :5] @ x_TD[token], gate_up_EID[expert, 5:] @ x_TD[token]
            have = h_RI[order.place_TK[token, k]]
            torch.testing.assert_close(have, gate * torch.sigmoid(gate) * up, rtol=1e-4, atol=1e-5)
    gaps = order.order_R[: int(order.ends_E[-1])] < 0
    assert (h_RI[: len(gaps)][gaps] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_a_loop_over_tokens(backend: str) -> None:
    torch.manual_seed(0)
    experts_TK = torch.tensor([[1, 0], [0, 2], [1, 2]])
    order = expert_order(experts_TK, 3)
    x_TD, gate_up_EID = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, 8, requires_grad=True)
    upstream_TKI = torch.randn(3, 2, 4)
    gate_up_TKI = torch.einsum("td,tkid->tki", x_TD, gate_up_EID[experts_TK])
    gate_TKI, up_TKI = gate_up_TKI.chunk(2, -1)
    want = torch.autograd.grad(gate_TKI * torch.sigmoid(gate_TKI) * up_TKI, (x_TD, gate_up_EID), upstream_TKI)
    with configure({"*": backend}):
        h_RI = grouped_swiglu(x_TD, gate_up_EID, order)
        have = torch.autograd.grad(h_RI[order.place_TK.long()], (x_TD, gate_up_EID), upstream_TKI)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument() -> None:
    order = expert_order(torch.zeros(3, 2, dtype=torch.int64), 2)
    x_TD, gate_up_EID = torch.randn(3, 8), torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match=r"x_TD has shape \[4, 8\]; expected \[T, D\] = \[3, any\]"):
        grouped_swiglu(torch.randn(4, 8), gate_up_EID, order)
    with pytest.raises(ValueError, match=r"gate_up_EID has shape \[3, 6, 8\]; expected \[E, 2·I, D\] = \[2, any, 8\]"):
        grouped_swiglu(x_TD, torch.randn(3, 6, 8), order)
    with pytest.raises(ValueError, match="gate_up_EID has 5 rows for each expert; expected an even number"):
        grouped_swiglu(x_TD, torch.randn(2, 5, 8), order)
    with pytest.raises(TypeError, match="gate_up_EID is bfloat16; expected one of float32"):
        grouped_swiglu(x_TD, gate_up_EID.bfloat16(), order)
