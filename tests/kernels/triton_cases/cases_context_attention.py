"""Attention of new tokens over a context in slices: kernel against reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepwright_kernels import context_attention, dispatch
from deepwright_kernels.context_attention import slices

from .sides import DEVICE, TOLERANCE, draw


def context(
    lengths: list[int], queries: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype
) -> tuple[Callable[[int, int], tuple[Tensor, Tensor]], int, Tensor, Tensor]:
    """(expand, context, positions, lengths) of sequences of which the last `queries` tokens are new. What lies beyond
    a length is NaN; a sequence shorter than the new tokens has padding queries, at position 0."""
    size, batch = max(lengths) + 3, len(lengths)
    lengths_B = torch.tensor(lengths, device=DEVICE)
    k, v = draw(batch, size, kv_heads, width, dtype=dtype), draw(batch, size, kv_heads, value_width, dtype=dtype)
    beyond_BN = torch.arange(size, device=DEVICE) >= lengths_B[:, None]
    k[beyond_BN], v[beyond_BN] = torch.nan, torch.nan
    index_Q = torch.arange(queries, device=DEVICE)
    old_B1 = (lengths_B[:, None] - queries).clamp(min=0)
    positions_BQ = torch.where(index_Q < lengths_B[:, None], old_B1 + index_Q, 0)
    return lambda begin, end: (k[:, begin:end], v[:, begin:end]), size, positions_BQ, lengths_B


@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "kv_heads", "width", "value_width", "step", "dtype"),
    [
        ([1], 1, 1, 1, 16, 16, 1000, torch.float32),
        ([30, 5, 0], 9, 2, 1, 24, 12, 1000, torch.float32),
        ([30, 5, 0], 9, 2, 1, 24, 12, 17, torch.float32),
        ([21], 18, 1, 1, 48, 32, 8, torch.bfloat16),
    ],
)
def test_context_attention(
    lengths: list[int],
    queries: int,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    step: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slices, "SHORTEST_SLICE", step)
    monkeypatch.setattr(slices, "SLICE_VALUES", 0)
    arguments = (
        draw(len(lengths), queries, heads, width, dtype=dtype),
        *context(lengths, queries, kv_heads, width, value_width, dtype),
        width**-0.5,
    )
    out = context_attention(*arguments)
    want = dispatch.load("context_attention", "reference")(*arguments, None)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, want, **TOLERANCE[dtype])
    starts_BQ = (arguments[3] - 4).clamp(min=0)
    want = dispatch.load("context_attention", "reference")(*arguments, starts_BQ)
    torch.testing.assert_close(context_attention(*arguments, starts_BQ), want, **TOLERANCE[dtype])


def test_an_empty_context_gives_zeros() -> None:
    expand, _, positions_BQ, lengths_B = context([0, 0], 3, 1, 16, 16, torch.float32)
    out = context_attention(draw(2, 3, 1, 16), expand, 0, positions_BQ, lengths_B, 1.0)
    assert torch.equal(out, torch.zeros(2, 3, 1, 16, device=DEVICE))
