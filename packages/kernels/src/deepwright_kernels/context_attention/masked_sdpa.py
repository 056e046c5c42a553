"""The operator through torch's scaled_dot_product_attention with a dense mask: for a CPU, where a context is short.

Shapes: B sequences, Q new tokens of each, H query heads, G key/value heads, K key width, V value width, N positions of
the context.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..packed_attention.fused_sdpa import fused
from .reference import seen


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
    on_cpu = q_BQHK.device.type == "cpu"
    if on_cpu and lengths_B.numel():
        context = min(context, int(lengths_B.max()))  # nobody expands what no sequence has
    k_BNGK, v_BNGV = expand(0, context)
    # A weight of zero does not silence a NaN. That there is one beyond a length is rare, and a CPU can ask.
    if not on_cpu or not math.isfinite(float(k_BNGK.sum() + v_BNGV.sum())):
        beyond_BN11 = (torch.arange(context, device=q_BQHK.device) >= lengths_B[:, None])[:, :, None, None]
        k_BNGK, v_BNGV = (t.masked_fill(beyond_BN11, 0.0) for t in (k_BNGK, v_BNGV))
    mask_B1QN = seen(positions_BQ, lengths_B, starts_BQ, context)[:, None]
    # torch gives zeros, not NaN, for a query that sees nothing.
    return fused(q_BQHK, k_BNGK, v_BNGV, mask_B1QN, scale)
