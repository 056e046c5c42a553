"""Attention over a context in slices, with packed_attention's forward kernel for Hopper: with the one in Triton where
values turn out to have another width than it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..operation import Operation
from ..packed_attention import hopper, triton
from ..packed_attention.widths import why_not_hopper
from .slices import attend_slice, empty_slice, over_slices


def _attend(
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
    tensors = (q_BQHK, k_BNGK, v_BNGV, positions_BQ, lengths_B, starts_BQ, carried_BQHV, carried_sums_BHQ)
    # How wide values are is seen only here.
    fits = why_not_hopper(q_BQHK.dtype, q_BQHK.shape[-1], v_BNGV.shape[-1]) is None
    return attend_slice(hopper.attend if fits else triton.attend, *tensors, offset, scale, dtype)


_slice = Operation("context_attention_hopper", _attend)
_slice.shapes(empty_slice)


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
