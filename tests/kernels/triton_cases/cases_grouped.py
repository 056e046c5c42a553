"""Grouped products: kernels against references, empty groups, ungainly sizes and gaps included."""

import pytest
import torch

from deepwright_kernels import dispatch, expert_order, grouped_linear, grouped_swiglu

from .sides import DEVICE, TOLERANCE, both, draw

# The GPU's kernels multiply 16-bit numbers; the interpreter makes them float32.
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "inputs", "outputs"),
    [([3, 0, 4], 8, 16), ([0, 0, 40], 16, 40), ([17, 33, 1, 0], 48, 72), ([0, 0], 8, 8)],
)
def test_grouped_linear(dtype: torch.dtype, counts: list[int], inputs: int, outputs: int) -> None:
    x_TK, weight_ENK = (
        draw(sum(counts), inputs, dtype=dtype, grad=True),
        draw(len(counts), outputs, inputs, dtype=dtype),
    )
    weight_ENK.requires_grad_()
    arguments = (x_TK, weight_ENK, ends(counts))
    want, have = both("grouped_linear", arguments, (x_TK, weight_ENK), draw(sum(counts), outputs, dtype=dtype))
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype]["rtol"], atol=10 * TOLERANCE[dtype]["atol"])


def test_rows_of_another_group_are_never_added() -> None:
    """Not even ones that are not numbers."""
    x_TK, weight_ENK = draw(20, 16, dtype=DTYPES[0]), draw(2, 16, 16, dtype=DTYPES[0], grad=True)
    x_TK[7:] = float("nan")
    y_TN = grouped_linear(x_TK, weight_ENK, ends([7, 13]))
    assert torch.isfinite(y_TN[:7]).all()
    (grad_ENK,) = torch.autograd.grad(y_TN, weight_ENK, torch.ones_like(y_TN))
    assert torch.isfinite(grad_ENK[0]).all() and grad_ENK[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "copies", "experts", "alignment", "hidden", "width"),
    [(20, 2, 3, 1, 16, 8), (9, 3, 4, 8, 40, 24), (1, 1, 2, 1, 8, 8), (0, 2, 2, 1, 8, 8)],
)
def test_grouped_swiglu(
    dtype: torch.dtype, tokens: int, copies: int, experts: int, alignment: int, hidden: int, width: int
) -> None:
    order = expert_order(torch.randint(experts, (tokens, copies), device=DEVICE), experts, alignment)
    x_TD = draw(tokens, hidden, dtype=dtype, grad=True)
    gate_up_EID = (draw(experts, 2 * width, hidden) / hidden**0.5).to(dtype).requires_grad_()
    upstream_RI = draw(len(order.order_R), width, dtype=dtype)
    # Rows past the last end belong to nobody.
    upstream_RI[(order.order_R < 0)] = 0.0
    arguments = (x_TD, gate_up_EID, order.order_R, order.place_TK, order.ends_E)
    want, have = both("grouped_swiglu", arguments, (x_TD, gate_up_EID), upstream_RI)
    last = int(order.ends_E[-1])
    pairs = [(have[0][:last], want[0][:last]), *zip(have[1:], want[1:], strict=True)]
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2 * TOLERANCE[dtype]["rtol"], atol=10 * TOLERANCE[dtype]["atol"])
    with torch.no_grad():
        torch.testing.assert_close(dispatch.load("grouped_swiglu", "triton")(*arguments)[:last], have[0][:last])


def test_grouped_products_keep_torchs_rules() -> None:
    dtype = torch.bfloat16  # torch cannot yet trace its grouped product in float32
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    dispatch.load("grouped_linear", "triton")  # registers the operators
    x_TK, weight_ENK = draw(6, 8, dtype=dtype, grad=True), draw(2, 16, 8, dtype=dtype, grad=True)
    torch.library.opcheck(
        torch.ops.deepwright.grouped_linear.default, (x_TK, weight_ENK, ends([2, 4])), test_utils=tests
    )
    order = expert_order(torch.tensor([[0], [1], [1], [0], [0], [1]], device=DEVICE), 2)
    arguments = (x_TK, weight_ENK, order.order_R, order.place_TK, order.ends_E, True)
    # The results are compared with a second run: what is kept of no row is not written.
    torch.library.opcheck(torch.ops.deepwright.grouped_swiglu.default, arguments, test_utils=tests)

    def experts(x_TK: torch.Tensor, weight_ENK: torch.Tensor) -> torch.Tensor:
        return grouped_linear(grouped_swiglu(x_TK, weight_ENK, order), weight_ENK[:, :8], order.ends_E).float().sum()

    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    leaves = (x_TK, weight_ENK)
    for have, want in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(experts(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(have, want)
