"""Attention over a context in slices, with the forward kernel of packed_attention.

The context's keys and values are expanded slice by slice. A slice's result and log-sum-exp are where the next one's
online softmax goes on, in float32 until the last: what is expanded at a time has a bounded size, however long the
context, and nothing has to be merged afterwards.

Shapes: B sequences, Q new tokens of each, H query heads, G key/value heads, K key width, V value width, N positions of
a slice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..packed_attention.triton import attend, describable

# Numbers in a slice's keys and values: 1 GiB in bfloat16. A slice is long enough to be worth its launches.
SLICE_VALUES = 2**29
SHORTEST_SLICE = 1024


@torch.library.custom_op("deepwright::context_attention", mutates_args=())
def _slice(
    q_BQHK: Tensor,
    k_BNGK: Tensor,
    v_BNGV: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    starts_BQ: Tensor | None,
    carried_BQHV: Tensor | None,
    carried_sums_BHQ: Tensor | None,
    offset: int,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q_BQHK.shape
    out = torch.zeros((batch, queries, heads, v_BNGV.shape[-1]), dtype=dtype, device=q_BQHK.device)
    sums_BHQ = torch.empty((batch, heads, queries), dtype=torch.float32, device=q_BQHK.device)
    if out.numel() and k_BNGK.numel():
        carry = None if carried_BQHV is None or carried_sums_BHQ is None else (carried_BQHV, carried_sums_BHQ)
        q, k, v = (describable(t) for t in (q_BQHK, k_BNGK, v_BNGV))
        attend(q, k, v, starts_BQ, positions_BQ, lengths_B, carry, out, sums_BHQ, offset, scale)
    return out, sums_BHQ


@_slice.register_fake
def _(
    q_BQHK: Tensor,
    k_BNGK: Tensor,
    v_BNGV: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    starts_BQ: Tensor | None,
    carried_BQHV: Tensor | None,
    carried_sums_BHQ: Tensor | None,
    offset: int,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q_BQHK.shape
    return (
        q_BQHK.new_empty((batch, queries, heads, v_BNGV.shape[-1]), dtype=dtype),
        q_BQHK.new_empty((batch, heads, queries), dtype=torch.float32),
    )


def context_attention(
    q_BQHK: Tensor,
    expand: Callable[[int, int], tuple[Tensor, Tensor]],
    context: int,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    scale: float,
    starts_BQ: Tensor | None,
) -> Tensor:
    """See the operator's docstring."""
    batch, _, heads, width = q_BQHK.shape
    values = max(1, batch * heads * 2 * width)  # of one position, at most
    step = max(SHORTEST_SLICE, SLICE_VALUES // values)
    out = sums = None
    for begin in range(0, max(context, 1), step):
        end = min(begin + step, context)
        k_BNGK, v_BNGV = expand(begin, end)
        dtype = q_BQHK.dtype if end == context else torch.float32
        out, sums = _slice(q_BQHK, k_BNGK, v_BNGV, positions_BQ, lengths_B, starts_BQ, out, sums, begin, scale, dtype)
        del k_BNGK, v_BNGV
    assert out is not None
    return out
