"""Attention over a context in slices, with packed_attention's forward kernel in Triton."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..packed_attention.triton import attend
from .slices import over_slices, slice_operation

_slice = slice_operation("context_attention", attend)


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
    return over_slices(_slice, q_BQHK, expand, context, positions_BQ, lengths_B, scale, starts_BQ)
