"""Experts that train in FP8: near the plain ones, the plain ones in evaluation, and no row of one expert in another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepwright_core.model.fp8 import TrainsInFp8
from deepwright_kernels import expert_order
from deepwright_moe.mixture import Experts

EXPERTS, TOP_K, HIDDEN, WIDTH = 4, 2, 32, 48


def experts() -> Experts:
    torch.manual_seed(0)
    made = Experts(EXPERTS, TOP_K, HIDDEN, WIDTH)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def run(made: Experts, x_TD: Tensor, chosen_TK: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients, token copy by token copy: gaps between experts are left out."""
    order = expert_order(chosen_TK, EXPERTS, made.alignment)
    with torch.autocast("cpu", torch.bfloat16):
        y_TKD = made(x_TD, order)[order.place_TK]
    return y_TKD, *torch.autograd.grad(y_TKD.float().square().sum(), (x_TD, *made.parameters()))


@pytest.mark.parametrize("chosen", ["spread", "all to one expert"])
def test_in_fp8_they_are_near_the_plain_ones(chosen: str) -> None:
    plain, converted = experts(), experts()
    converted.train_in_fp8()
    x_TD = torch.randn(40, HIDDEN, requires_grad=True)
    chosen_TK = torch.rand(40, EXPERTS).topk(TOP_K).indices
    if chosen != "spread":
        chosen_TK = torch.tensor([[2, 1]]).expand(40, TOP_K).contiguous()
    assert (plain.alignment, converted.alignment) == (1, 128)
    for have, want in zip(run(converted, x_TD, chosen_TK), run(plain, x_TD, chosen_TK), strict=True):
        assert have.dtype == want.dtype
        assert 0 < (have - want).norm() / want.norm() < 0.1


def test_in_evaluation_they_are_the_plain_ones() -> None:
    plain, converted = experts().eval(), experts().eval()
    converted.train_in_fp8()
    x_TD, chosen_TK = torch.randn(9, HIDDEN, requires_grad=True), torch.rand(9, EXPERTS).topk(TOP_K).indices
    for have, want in zip(run(converted, x_TD, chosen_TK), run(plain, x_TD, chosen_TK), strict=True):
        assert torch.equal(have, want)


def test_their_matrices_are_named_for_the_check_of_sizes() -> None:
    made = experts()
    assert isinstance(made, TrainsInFp8)
    assert {name: tuple(matrix.shape) for name, matrix in made.fp8_matrices().items()} == {
        "experts' gate": (EXPERTS, WIDTH, HIDDEN),
        "experts' up": (EXPERTS, WIDTH, HIDDEN),
        "experts' down": (EXPERTS, HIDDEN, WIDTH),
    }
