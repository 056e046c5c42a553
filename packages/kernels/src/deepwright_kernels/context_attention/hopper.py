"""Attention over a context in slices, with packed_attention's forward kernel for Hopper: with the one in Triton where
values turn out to have another width than it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..packed_attention import hopper, triton
from ..packed_attention.widths import why_not_hopper
from .slices import over_slices, slice_operation


def _attend(q_BQHK: Tensor, k_BNGK: Tensor, v_BNGV: Tensor, *rest: Any) -> None:
    # How wide values are is seen only here.
    fits = why_not_hopper(q_BQHK.dtype, q_BQHK.shape[-1], v_BNGV.shape[-1]) is None
    (hopper if fits else triton).attend(q_BQHK, k_BNGK, v_BNGV, *rest)


_slice = slice_operation("context_attention_hopper", _attend)


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
