"""A context in slices: expanded one at a time, each one's result and log-sum-exp carried to the next.

The next slice's online softmax goes on where the one before stopped, in float32 until the last: what is expanded at a
time has a bounded size, however long the context, and nothing has to be merged afterwards.

Shapes: B sequences, Q new tokens of each, H query heads, G key/value heads, K key width, V value width, N positions of
a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operation import Operation

# Numbers in a slice's keys and values: 1 GiB in bfloat16. A slice is long enough to be worth its launches.
SLICE_VALUES = 2**29
SHORTEST_SLICE = 1024

# Fills out [B, Q, H, V] and the log-sum-exps [B, H, Q] from (q, k, v, starts, positions, lengths, carry, out, sums,
# offset of the slice, scale).
Attend = Callable[..., None]


def slice_operation(name: str, attend: Attend) -> Operation:
    """The operation `name`: one slice with this kernel, result so far (in `dtype`) and log-sum-exps."""

    def one_slice(
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
            attend(q_BQHK, k_BNGK, v_BNGV, starts_BQ, positions_BQ, lengths_B, carry, out, sums_BHQ, offset, scale)
        return out, sums_BHQ

    operation = Operation(name, one_slice)
    operation.shapes(_empty)
    return operation


def _empty(q_BQHK: Tensor, k_BNGK: Tensor, v_BNGV: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What an operation of these gives, without the work: for tracing."""
    dtype: torch.dtype = rest[-1]
    batch, queries, heads, _ = q_BQHK.shape
    return (
        q_BQHK.new_empty((batch, queries, heads, v_BNGV.shape[-1]), dtype=dtype),
        q_BQHK.new_empty((batch, heads, queries), dtype=torch.float32),
    )


def over_slices(
    one_slice: Callable[..., tuple[Tensor, Tensor]],
    q_BQHK: Tensor,
    expand: Callable[[int, int], tuple[Tensor, Tensor]],
    context: int,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    scale: float,
    starts_BQ: Tensor | None,
) -> Tensor:
    """out_BQHV in q's dtype. `one_slice`: of `slice_operation`."""
    batch, _, heads, width = q_BQHK.shape
    values = max(1, batch * heads * 2 * width)  # of one position, at most
    step = max(SHORTEST_SLICE, SLICE_VALUES // values)
    out = sums = None
    for begin in range(0, max(context, 1), step):
        end = min(begin + step, context)
        dtype = q_BQHK.dtype if end == context else torch.float32
        out, sums = one_slice(
            q_BQHK, *expand(begin, end), positions_BQ, lengths_B, starts_BQ, out, sums, begin, scale, dtype
        )
    assert out is not None
    return out
