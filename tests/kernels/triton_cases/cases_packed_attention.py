"""Attention over packed rows: kernels against reference."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dispatch, packed_attention

from .sides import DEVICE, OPCHECKS, TOLERANCE, both, draw


def starts_of(lengths: list[list[int]]) -> Tensor:
    """The start of each position's document, from the lengths of the documents of each row."""
    rows = [
        [sum(row[:n]) for n, length in enumerate(row) for _ in range(length)]
        for row in lengths
    ]  # fmt: skip
    return torch.tensor(rows, device=DEVICE)


CASES = {
    "one token": (1, 1, 1, 16, 16, None),
    "one document": (37, 2, 1, 24, 16, None),
    "split width, short documents": (35, 1, 1, 48, 32, [[3, 1, 20, 11], [35]]),
    "groups, odd widths": (33, 2, 1, 20, 12, [[16, 17]]),
    "value wider than key": (18, 1, 1, 16, 40, [[9, 9]]),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [("split width, short documents", torch.bfloat16)],
    ids=str,
)
def test_output_and_gradients(case: str, dtype: torch.dtype) -> None:
    size, heads, kv_heads, width, value_width, lengths = CASES[case]
    batch = len(lengths) if lengths else 1
    starts_BS = starts_of(lengths) if lengths else None
    q = draw(batch, size, heads, width, dtype=dtype, grad=True)
    k = draw(batch, size, kv_heads, width, dtype=dtype, grad=True)
    v = draw(batch, size, kv_heads, value_width, dtype=dtype, grad=True)
    upstream = draw(batch, size, heads, value_width, dtype=dtype)
    want, have = both("packed_attention", (q, k, v, starts_BS, width**-0.5), (q, k, v), upstream)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


def test_views_and_expanded_gradients() -> None:
    """Values that are a part of a wider tensor, transposed queries, and the gradient of a sum."""
    wide = draw(1, 20, 2, 48, grad=True)
    k, v = wide.split([16, 32], -1)
    q = draw(1, 2, 20, 16, grad=True).transpose(1, 2)
    upstream = torch.ones((), device=DEVICE).expand(1, 20, 2, 32)
    want, have = both("packed_attention", (q, k, v, None, 0.25), (q, wide), upstream)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_a_sliding_window() -> None:
    q, k, v = (draw(1, 40, 1, 16, grad=True) for _ in range(3))
    starts_BS = (torch.arange(40, device=DEVICE)[None] - 6).clamp(min=0)
    want, have = both("packed_attention", (q, k, v, starts_BS, 0.25), (q, k, v), draw(1, 40, 1, 16))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_huge_scores() -> None:
    q, k, v = draw(1, 20, 1, 16) * 1e4, draw(1, 20, 1, 16) * 1e4, draw(1, 20, 1, 16)
    out = packed_attention(q, k, v, None, 1.0)
    torch.testing.assert_close(out, dispatch.load("packed_attention", "reference")(q, k, v, None, 1.0))


def test_the_same_bits_in_every_run() -> None:
    q, k, v = (draw(1, 30, 1, 16, grad=True) for _ in range(3))
    starts_BS, upstream = starts_of([[7, 23]]), draw(1, 30, 1, 16)
    runs = []
    for _ in range(2):
        out = packed_attention(q, k, v, starts_BS, 0.25)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing() -> None:
    q = draw(0, 5, 1, 16, grad=True)
    out = packed_attention(q, q, q, None, 1.0)
    assert out.shape == (0, 5, 1, 16)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_the_rules_of_torch() -> None:
    q, k, v = (draw(1, 5, 1, 16, grad=True) for _ in range(3))
    operator = torch.ops.deepwright.packed_attention.default
    dispatch.load("packed_attention", "triton")
    torch.library.opcheck(operator, (q, k, v, starts_of([[2, 3]]), 0.25), test_utils=OPCHECKS)
