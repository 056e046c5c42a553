"""What each operator runs as, row by row.

Forms that already give a row the same bits in any company are taken as they are: moves, integers, one program a token.
Others are made of separate operations of torch, which round each element by itself, or are those of this folder.

Shapes: T tokens, K copies of each, R rows in expert order, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import dispatch
from ..draw_tokens.reference import draw_tokens
from ..latent_cache_write.reference import store
from ..rotary import reference as rotary
from ..route import reference as route
from . import attention, elementwise, products


def run(name: str, arguments: tuple[Any, ...]) -> Any:
    """Call an operator for these arguments, of which the first is a tensor."""
    form = FORMS.get(name)
    if form is None:
        raise NotImplementedError(
            f"The operator {name} has no form for each row by itself; expected one of {', '.join(sorted(FORMS))}."
        )
    if name in SEEN:
        return form(*arguments)
    with torch._C.DisableTorchFunction():  # every look at a shape would go by the context too
        return form(*arguments)


def _by(cuda: str, elsewhere: str, name: str) -> Callable[..., Any]:
    """The operator's backend of this name on a GPU, and of that name elsewhere."""

    def form(tensor: Tensor, *others: Any) -> Any:
        return dispatch.load(name, cuda if tensor.is_cuda else elsewhere)(tensor, *others)

    return form


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.is_cuda:
        return dispatch.load("rms_norm", "triton")(x, weight, eps)  # a program has whole rows, as many as are wide
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    scale = torch.rsqrt(_mean_of_squares(x_wide) + eps)
    return (x_wide * scale * weight.to(wide)).to(x.dtype)


def _mean_of_squares(x: Tensor) -> Tensor:
    """Over the last dimension, kept; in halves, because torch chooses the order of a sum by the number of rows."""
    size = x.shape[-1]
    squares = functional.pad(x * x, (0, (1 << (size - 1).bit_length()) - size))
    while squares.shape[-1] > 1:
        left, right = squares.chunk(2, -1)
        squares = left + right
    return squares / size


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = (x.float() + residual.float()).to(residual.dtype) if x.dtype != torch.float64 else x + residual
    return _rms_norm(summed, weight, eps), summed


def _latent_cache_write(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor, cache_NW: Tensor, slots_T: Tensor
) -> None:
    latent_TC, rope_TR = kv_TW.split([weight_C.shape[0], 2 * cos_TF.shape[1]], dim=-1)
    store(_rms_norm(latent_TC, weight_C, eps), rotary.rotary(rope_TR, cos_TF, sin_TF), cache_NW, slots_T)


def _unpermute(y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    if y_RD.is_cuda:
        return dispatch.load("unpermute", "triton")(y_RD, order_R, place_TK, weights_TK)
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    out_TD = torch.zeros(len(place_TK), y_RD.shape[1], dtype=wide, device=y_RD.device)
    for place_T, weight_T in zip(place_TK.T, weights_TK.T, strict=True):
        out_TD = out_TD + y_RD[place_T.long()].to(wide) * weight_T[:, None].to(wide)
    return out_TD.to(y_RD.dtype)


def _grouped_swiglu(x_TD: Tensor, gate_up_EID: Tensor, order_R: Tensor, place_TK: Tensor, ends_E: Tensor) -> Tensor:
    x_RD = FORMS["permute"](x_TD, order_R, place_TK)
    gate_RI, up_RI = products.grouped(x_RD, gate_up_EID, ends_E).chunk(2, -1)
    return (functional.silu(gate_RI) if gate_RI.is_cuda else elementwise.silu(gate_RI)) * up_RI


def _draw_tokens(*arguments: Any) -> tuple[Tensor, Tensor]:
    *columns, any_random, any_truncated = arguments
    logits_BV: Tensor = columns[0]
    if logits_BV.is_cuda or not len(logits_BV):
        backend = "triton" if logits_BV.is_cuda else "reference"
        drawn: tuple[Tensor, Tensor] = dispatch.load("draw_tokens", backend)(*arguments)
        return drawn
    rows = [[column[row : row + 1] for column in columns] for row in range(len(logits_BV))]
    parts = [draw_tokens(*[*row, any_random, any_truncated]) for row in rows]
    return torch.cat([token_1 for token_1, _ in parts]), torch.cat([logprob_1 for _, logprob_1 in parts])


SEEN = ("route", "context_attention")
"""What calls functions of torch, or of a model, that the context has to see."""

FORMS: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary": rotary.rotary,
    "rotary_tail": rotary.rotary_tail,
    "latent_cache_write": _latent_cache_write,
    "mla_paged_decode": attention.mla_paged_decode,
    "context_attention": attention.context_attention,
    "route": route.route,
    "draw_tokens": _draw_tokens,
    "expert_order": _by("triton", "reference", "expert_order"),
    "permute": _by("triton", "torch", "permute"),
    "unpermute": _unpermute,
    "grouped_linear": products.grouped,
    "grouped_swiglu": _grouped_swiglu,
}
