"""Into expert order and back: kernels against reference, in one launch and in three."""

import pytest
import torch

from deepwright_kernels import dispatch, expert_order, permute, unpermute
from deepwright_kernels.token_permutation import sorting

from .sides import DEVICE, OPCHECKS, TOLERANCE, draw

SHAPES = [(5, 2, 3, 1), (45, 3, 6, 1), (20, 3, 5, 16), (0, 2, 4, 1), (1, 1, 1, 8), (0, 2, 3, 16)]


@pytest.mark.parametrize("few_copies", [sorting.FEW_COPIES, 0], ids=["one launch", "three launches"])
@pytest.mark.parametrize(("tokens", "copies", "experts", "alignment"), SHAPES)
def test_expert_order(
    monkeypatch: pytest.MonkeyPatch, few_copies: int, tokens: int, copies: int, experts: int, alignment: int
) -> None:
    monkeypatch.setattr(sorting, "FEW_COPIES", few_copies)
    for experts_TK in (
        torch.randint(experts, (tokens, copies), device=DEVICE),
        torch.full((tokens, copies), experts - 1, dtype=torch.int32, device=DEVICE),
    ):
        want = dispatch.load("expert_order", "reference")(experts_TK, experts, alignment)
        have = dispatch.load("expert_order", "triton")(experts_TK, experts, alignment)
        for a, b in zip(have, want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "copies", "experts", "alignment"), [*SHAPES[:3], SHAPES[5]])
def test_permute_and_unpermute(dtype: torch.dtype, tokens: int, copies: int, experts: int, alignment: int) -> None:
    width = 37
    order = expert_order(torch.randint(experts, (tokens, copies), device=DEVICE), experts, alignment)
    rows = len(order.order_R)
    x_TD, y_RD = draw(tokens, width, dtype=dtype, grad=True), draw(rows, width, dtype=dtype, grad=True)
    weights_TK = draw(tokens, copies, grad=True)
    upstream_RD, upstream_TD = draw(rows, width, dtype=dtype), draw(tokens, width, dtype=dtype)
    sides = []
    for backend in ("reference", "torch", "triton"):
        x_RD = dispatch.load("permute", backend)(x_TD, *order[:2])
        out_TD = dispatch.load("unpermute", backend)(y_RD, *order[:2], weights_TK)
        sides.append(
            (
                x_RD,
                out_TD,
                *torch.autograd.grad(x_RD, x_TD, upstream_RD),
                *torch.autograd.grad(out_TD, (y_RD, weights_TK), upstream_TD),
            )
        )
    for side in sides[1:]:
        for have, want in zip(side, sides[0], strict=True):
            assert have.dtype == want.dtype
            torch.testing.assert_close(have, want, rtol=TOLERANCE[dtype]["rtol"], atol=10 * TOLERANCE[dtype]["atol"])


def test_rows_that_do_not_lie_side_by_side_and_repeated_runs() -> None:
    order = expert_order(torch.randint(4, (20, 3), device=DEVICE), 4, 8)
    wide, weights_TK = draw(20, 50), draw(20, 3)
    x_TD = wide[:, 5:30]
    x_RD = permute(x_TD, order)
    torch.testing.assert_close(x_RD, permute(x_TD.contiguous(), order))
    assert torch.equal(unpermute(x_RD, order, weights_TK), unpermute(x_RD, order, weights_TK))


def test_the_moves_keep_torchs_rules() -> None:
    dispatch.load("permute", "triton")  # registers the operators
    ops = torch.ops.deepwright
    experts_TK = torch.randint(3, (4, 2), device=DEVICE)
    order_R, place_TK, _, _ = expert_order(experts_TK, 3, 4)
    torch.library.opcheck(ops.expert_order.default, (experts_TK, 3, 4), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.permute.default, (draw(4, 6, grad=True), order_R, place_TK), test_utils=OPCHECKS)
    rows = len(order_R)
    torch.library.opcheck(
        ops.unpermute.default,
        (draw(rows, 6, grad=True), order_R, place_TK, draw(4, 2, grad=True)),
        test_utils=OPCHECKS,
    )
