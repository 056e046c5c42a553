"""Causal attention for training over rows that may hold several documents, with gradients for q, k and v."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch
from ..arguments import (
    FLOATS,
    INTEGERS,
    in_autocast_dtype,
    require,
    require_device,
    require_dtype,
    require_shape,
)
from .widths import why_not_hopper, why_not_triton

NAME = "packed_attention"


def _fastest_on_cuda(q_BSHK: Tensor, *others: Any) -> tuple[str, ...]:
    if not others:
        return ("cuda", "triton", "torch", "reference")
    k_BSGK, v_BSGV, starts_BS = others[:3]
    # Plain causal attention is what torch has fused kernels for; with several documents it needs a dense mask.
    portable = ("torch", "triton") if starts_BS is None else ("triton", "torch")
    hopper = ("cuda",) if _cuda_needs(q_BSHK, k_BSGK, v_BSGV) is None else ()
    return (*hopper, *portable, "reference")


def _triton_needs(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *_: Any) -> str | None:
    return why_not_triton(q_BSHK.shape[-1], v_BSGV.shape[-1])


def _cuda_needs(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *_: Any) -> str | None:
    return why_not_hopper(q_BSHK.dtype, q_BSHK.shape[-1], v_BSGV.shape[-1])


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:packed_attention",
        "triton": f"{__name__}.triton:packed_attention",
        "torch": f"{__name__}.fused_sdpa:packed_attention",
        "cuda": f"{__name__}.hopper:packed_attention",
    },
    cuda=_fastest_on_cuda,
    elsewhere=("torch", "reference"),
    needs={"triton": _triton_needs, "cuda": _cuda_needs},
)


def packed_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, each query over the keys from its start to itself: out_BSHV in q's dtype.

    q_BSHK [B, S, H, K], k_BSGK [B, S, G, K], v_BSGV [B, S, G, V], all of one dtype; G divides H, and query head h reads
    key/value head h // (H / G). starts_BS [B, S] is the first position that each query sees: that of its document, or
    a later one for a sliding window. It must not decrease along a row, nor pass the query's own position (values are
    not checked). None means 0: one document a row. Softmax and sums in float32. Under autocast in its dtype.
    """
    require_shape(NAME, "q_BSHK", q_BSHK, (None,) * 4, "[B, S, H, K]")
    require_dtype(NAME, "q_BSHK", q_BSHK, FLOATS)
    batch, size, heads, width = q_BSHK.shape
    require_shape(NAME, "k_BSGK", k_BSGK, (batch, size, None, width), "[B, S, G, K]")
    kv_heads = k_BSGK.shape[2]
    require_shape(NAME, "v_BSGV", v_BSGV, (batch, size, kv_heads, None), "[B, S, G, V]")
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        NAME,
        "k_BSGK",
        f"has {kv_heads} heads; expected a divisor of the {heads} query heads",
    )
    for argument, tensor in (("k_BSGK", k_BSGK), ("v_BSGV", v_BSGV)):
        require_device(NAME, argument, tensor, q_BSHK.device)
        require_dtype(NAME, argument, tensor, FLOATS)
    if starts_BS is not None:
        require_shape(NAME, "starts_BS", starts_BS, (batch, size), "[B, S]")
        require_dtype(NAME, "starts_BS", starts_BS, INTEGERS)
        require_device(NAME, "starts_BS", starts_BS, q_BSHK.device)
    require(scale > 0, NAME, "scale", f"is {scale}; expected a positive number")
    q_BSHK, k_BSGK, v_BSGV = in_autocast_dtype(q_BSHK, k_BSGK, v_BSGV)
    for argument, tensor in (("k_BSGK", k_BSGK), ("v_BSGV", v_BSGV)):
        require_dtype(NAME, argument, tensor, (q_BSHK.dtype,))
    out_BSHV: Tensor = dispatch.run(NAME, q_BSHK, k_BSGK, v_BSGV, starts_BS, scale)
    return out_BSHV
