"""Attention of new tokens over a context: against attention over whole sequences, NaN beyond lengths, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepwright_kernels import configure, context_attention, dispatch

LENGTHS, NEW = [9, 4, 6], 3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def expansion(k: Tensor, v: Tensor) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    return lambda begin, end: (k[:, begin:end], v[:, begin:end])


@BACKENDS
@pytest.mark.parametrize("window", [None, 2], ids=["all", "window"])
def test_new_tokens_get_what_whole_sequences_give(window: int | None, backend: str) -> None:
    torch.manual_seed(0)
    size, heads, kv_heads, width, value_width = 11, 4, 2, 6, 5
    k, v = (torch.randn(3, size, kv_heads, w, dtype=torch.float64) for w in (width, value_width))
    whole = torch.randn(3, size, heads, width, dtype=torch.float64)
    lengths_B = torch.tensor(LENGTHS)
    positions_BQ = lengths_B[:, None] - NEW + torch.arange(NEW)
    starts_BQ = None if window is None else (positions_BQ - window + 1).clamp(min=0)
    q = torch.stack([whole[b, positions_BQ[b]] for b in range(3)])
    # The whole sequence, one after another, before anything beyond its length becomes NaN.
    want = []
    for b, length in enumerate(LENGTHS):
        starts_1S = None if window is None else (torch.arange(length) - window + 1).clamp(min=0)[None]
        out = dispatch.load("packed_attention", "reference")(
            whole[b, None, :length], k[b, None, :length], v[b, None, :length], starts_1S, 0.4
        )
        want.append(out[0, -NEW:])
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    with configure({"context_attention": backend}):
        have = context_attention(q, expansion(k, v), size, positions_BQ, lengths_B, 0.4, starts_BQ)
    torch.testing.assert_close(have, torch.stack(want))


@BACKENDS
def test_a_query_that_sees_nothing_gives_zeros(backend: str) -> None:
    k = torch.full((1, 4, 1, 8), torch.nan)
    with configure({"context_attention": backend}):
        for context in (0, 4):
            out = context_attention(
                torch.randn(1, 2, 1, 8),
                expansion(k, k),
                context,
                torch.zeros(1, 2, dtype=torch.int64),
                torch.zeros(1, dtype=torch.int64),
                1.0,
            )
            assert torch.equal(out, torch.zeros(1, 2, 1, 8))


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"q": torch.zeros(2, 3)}, ValueError, r"context_attention: q_BQHK has shape \[2, 3\]"),
        ({"context": -1}, ValueError, "context is -1; expected a number of positions"),
        ({"positions": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, r"positions_BQ has shape \[1, 3\]"),
        ({"lengths": torch.zeros(1)}, TypeError, "lengths_B is float32; expected one of int32, int64"),
        ({"scale": -1.0}, ValueError, "scale is -1.0; expected a positive number"),
        ({"starts": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"starts_BQ has shape \[2, 2\]"),
        (
            {"expand": lambda begin, end: (torch.zeros(1, 7, 2, 8), torch.zeros(1, 7, 2, 8))},
            ValueError,
            r"expand's keys has shape \[1, 7, 2, 8\]; expected \[B, N, G, K\]",
        ),
        (
            {"expand": lambda begin, end: (torch.zeros(1, end, 3, 8), torch.zeros(1, end, 3, 8))},
            ValueError,
            "expand's keys have 3 heads; expected a divisor of the 4 query heads",
        ),
        (
            {"expand": lambda begin, end: (torch.zeros(1, end, 2, 8).double(), torch.zeros(1, end, 2, 8))},
            TypeError,
            "expand's keys is float64; expected one of float32",
        ),
    ],
)
def test_what_is_refused(changed: dict[str, object], error: type[Exception], sentence: str) -> None:
    arguments = {
        "q": torch.zeros(1, 2, 4, 8),
        "expand": lambda begin, end: (torch.zeros(1, end, 2, 8), torch.zeros(1, end, 2, 8)),
        "context": 5,
        "positions": torch.zeros(1, 2, dtype=torch.int64),
        "lengths": torch.full((1,), 5),
        "scale": 1.0,
        "starts": None,
    }
    with pytest.raises(error, match=sentence):
        context_attention(*(arguments | changed).values())  # type: ignore[arg-type]
