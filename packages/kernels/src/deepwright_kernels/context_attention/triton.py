"""Attention over a context in slices, with packed_attention's forward kernel in Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..operation import Operation
from ..packed_attention.triton import attend
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
    return attend_slice(attend, *tensors, offset, scale, dtype)


_slice = Operation("context_attention", _attend)
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
