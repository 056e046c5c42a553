"""Causal attention over packed rows: the definition, documents apart, gradients, and what is refused."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from deepwright_kernels import configure, dispatch, packed_attention

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def drawn(batch: int, size: int, heads: int, kv_heads: int, width: int, value_width: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return tuple(torch.randn(batch, size, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def by_hand(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> Tensor:
    """One row, one query, one head at a time."""
    batch, size, heads, _ = q_BSHK.shape
    out = torch.empty(batch, size, heads, v_BSGV.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for s in range(size):
            first = 0 if starts_BS is None else int(starts_BS[b, s])
            for head in range(heads):
                served = head // (heads // k_BSGK.shape[2])
                keys, values = k_BSGK[b, first : s + 1, served], v_BSGV[b, first : s + 1, served]
                weights = [math.exp(float(q_BSHK[b, s, head] @ key) * scale) for key in keys]
                out[b, s, head] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    return out


@BACKENDS
@pytest.mark.parametrize("starts", [None, [[0, 0, 0, 3, 3, 5, 5], [0, 1, 1, 1, 1, 1, 6]]], ids=["one", "packed"])
@torch.no_grad()
def test_it_is_the_softmax_over_what_a_query_sees(starts: list[list[int]] | None, backend: str) -> None:
    q, k, v = drawn(2, 7, 4, 2, 6, 5)
    starts_BS = None if starts is None else torch.tensor(starts)
    with configure({"packed_attention": backend}):
        have = packed_attention(q, k, v, starts_BS, 0.3)
    torch.testing.assert_close(have, by_hand(q, k, v, starts_BS, 0.3))


@BACKENDS
def test_documents_packed_are_documents_alone(backend: str) -> None:
    q, k, v = drawn(1, 12, 2, 1, 8, 4)
    cuts = [0, 5, 6, 12]
    starts_BS = torch.tensor([[0] * 5 + [5] + [6] * 6])
    upstream = torch.randn(1, 12, 2, 4, dtype=torch.float64)
    with configure({"packed_attention": backend}):
        packed = packed_attention(q, k, v, starts_BS, 0.5)
        alone = torch.cat(
            [packed_attention(*(t[:, a:b] for t in (q, k, v)), None, 0.5) for a, b in itertools.pairwise(cuts)],
            1,
        )
    torch.testing.assert_close(packed, alone)
    gradients = [torch.autograd.grad(out, (q, k, v), upstream) for out in (packed, alone)]
    torch.testing.assert_close(gradients[0], gradients[1])


@BACKENDS
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    starts_BS = torch.tensor([[0, 0, 2, 2, 2]])
    with configure({"packed_attention": backend}):
        assert torch.autograd.gradcheck(lambda *t: packed_attention(*t, starts_BS, 0.7), drawn(1, 5, 2, 1, 4, 3))


def test_the_softmax_is_in_float32_whatever_the_dtype() -> None:
    q, k, v = (t.detach().bfloat16() for t in drawn(1, 9, 1, 1, 8, 8))
    out = packed_attention(q, k, v, None, 1.0)
    assert out.dtype == torch.bfloat16
    want = dispatch.load("packed_attention", "reference")(q.float(), k.float(), v.float(), None, 1.0)
    torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=2e-2)


def test_autocast_decides_the_dtype() -> None:
    q, k, v = (t.detach().float() for t in drawn(1, 4, 1, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(q, k.bfloat16(), v, None, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"q": torch.zeros(2, 3)}, ValueError, r"packed_attention: q_BSHK has shape \[2, 3\]; expected \[B, S, H, K\]"),
        ({"q": torch.zeros(1, 3, 4, 8, dtype=torch.int64)}, TypeError, "packed_attention: q_BSHK is int64"),
        ({"k": torch.zeros(1, 3, 2, 7)}, ValueError, r"k_BSGK has shape .*\[B, S, G, K\] = \[1, 3, any, 8\]"),
        ({"v": torch.zeros(1, 3, 1, 8)}, ValueError, r"v_BSGV has shape .*\[B, S, G, V\] = \[1, 3, 2, any\]"),
        (
            {"k": torch.zeros(1, 3, 3, 8), "v": torch.zeros(1, 3, 3, 8)},
            ValueError,
            "k_BSGK has 3 heads; expected a divisor of the 4 query heads",
        ),
        ({"v": torch.zeros(1, 3, 2, 8).bfloat16()}, TypeError, "v_BSGV is bfloat16; expected one of float32"),
        ({"starts": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, r"starts_BS has shape \[1, 4\]"),
        ({"starts": torch.zeros(1, 3)}, TypeError, "starts_BS is float32; expected one of int32, int64"),
        ({"scale": 0.0}, ValueError, "scale is 0.0; expected a positive number"),
        ({"k": torch.zeros(1, 3, 2, 8, device="meta")}, ValueError, "k_BSGK is on meta"),
    ],
)
def test_what_is_refused(changed: dict[str, object], error: type[Exception], sentence: str) -> None:
    arguments = {
        "q": torch.zeros(1, 3, 4, 8),
        "k": torch.zeros(1, 3, 2, 8),
        "v": torch.zeros(1, 3, 2, 8),
        "starts": None,
        "scale": 1.0,
    }
    with pytest.raises(error, match=sentence):
        packed_attention(*(arguments | changed).values())  # type: ignore[arg-type]
