"""Attention of new tokens over a context that is expanded on the way: chunked prefill. Inference only."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, INTEGERS, require, require_device, require_dtype, require_shape
from ..packed_attention.widths import HOPPER_VALUES, why_not_hopper, why_not_triton

NAME = "context_attention"
Expand = Callable[[int, int], tuple[Tensor, Tensor]]


# Up to this many new tokens a sequence, as in decoding, the smaller tiles of Triton's kernel waste less.
FEW_QUERIES = 64


def _fastest_on_cuda(q_BQHK: Tensor, *_: object) -> tuple[str, ...]:
    hopper = q_BQHK.ndim == 4 and q_BQHK.shape[1] > FEW_QUERIES and _cuda_needs(q_BQHK) is None
    return ("cuda", "triton", "torch", "reference") if hopper else ("triton", "torch", "reference")


def _triton_needs(q_BQHK: Tensor, *_: object) -> str | None:
    return why_not_triton(q_BQHK.shape[-1])


def _cuda_needs(q_BQHK: Tensor, *_: object) -> str | None:
    return why_not_hopper(q_BQHK.dtype, q_BQHK.shape[-1], HOPPER_VALUES[0])


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:context_attention",
        "triton": f"{__name__}.triton:context_attention",
        "torch": f"{__name__}.masked_sdpa:context_attention",
        "cuda": f"{__name__}.hopper:context_attention",
    },
    cuda=_fastest_on_cuda,
    elsewhere=("torch", "reference"),
    needs={"triton": _triton_needs, "cuda": _cuda_needs},
)


def context_attention(
    q_BQHK: Tensor,
    expand: Expand,
    context: int,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    scale: float,
    starts_BQ: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v, each new token over what its sequence has cached up to it: out_BQHV in q's dtype.

    q_BQHK [B, Q, H, K]. `expand(begin, end)` gives keys [B, end - begin, G, K] and values [B, end - begin, G, V] of the
    positions begin .. end - 1 of every sequence, in q's dtype; G divides H. It is asked for slices of the `context`
    positions one after the other, so that a long context is never expanded as a whole. positions_BQ [B, Q] the
    position of each query, lengths_B [B] the tokens of each sequence: a query sees the keys at index <= its position,
    < its sequence's length and, where starts_BQ [B, Q] is given, >= its start. One that sees none gives zeros.
    Keys and values beyond a length may be anything, NaN included. No gradients.
    """
    require_shape(NAME, "q_BQHK", q_BQHK, (None,) * 4, "[B, Q, H, K]")
    require_dtype(NAME, "q_BQHK", q_BQHK, FLOATS)
    batch, queries, heads, width = q_BQHK.shape
    require(context >= 0, NAME, "context", f"is {context}; expected a number of positions")
    require(scale > 0, NAME, "scale", f"is {scale}; expected a positive number")
    require_shape(NAME, "positions_BQ", positions_BQ, (batch, queries), "[B, Q]")
    require_shape(NAME, "lengths_B", lengths_B, (batch,), "[B]")
    indices = {"positions_BQ": positions_BQ, "lengths_B": lengths_B}
    if starts_BQ is not None:
        require_shape(NAME, "starts_BQ", starts_BQ, (batch, queries), "[B, Q]")
        indices["starts_BQ"] = starts_BQ
    for argument, tensor in indices.items():
        require_dtype(NAME, argument, tensor, INTEGERS)
        require_device(NAME, argument, tensor, q_BQHK.device)

    def checked(begin: int, end: int) -> tuple[Tensor, Tensor]:
        k_BNGK, v_BNGV = expand(begin, end)
        require_shape(NAME, "expand's keys", k_BNGK, (batch, end - begin, None, width), "[B, N, G, K]")
        kv_heads = k_BNGK.shape[2]
        require_shape(NAME, "expand's values", v_BNGV, (batch, end - begin, kv_heads, None), "[B, N, G, V]")
        require(
            kv_heads > 0 and heads % kv_heads == 0,
            NAME,
            "expand's keys",
            f"have {kv_heads} heads; expected a divisor of the {heads} query heads",
        )
        for argument, tensor in (("expand's keys", k_BNGK), ("expand's values", v_BNGV)):
            require_dtype(NAME, argument, tensor, (q_BQHK.dtype,))
            require_device(NAME, argument, tensor, q_BQHK.device)
        return k_BNGK, v_BNGV

    out_BQHV: Tensor = dispatch.run(NAME, q_BQHK, checked, context, positions_BQ, lengths_B, scale, starts_BQ)
    return out_BQHV
