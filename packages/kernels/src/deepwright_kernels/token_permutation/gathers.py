"""The moves into expert order and back as gathers of torch, in the backward pass too.

A copy has one place, so the gradient of a gather by the places is a gather by the order. (Autograd's own backward of
indexing is a scatter-add: slower, and not deterministic on a GPU.)

Shapes: T tokens, K copies of each, D width, R rows in expert order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _rows_by_copy(rows_CD: Tensor, order_R: Tensor, copies: int, gaps: bool) -> Tensor:
    """Row order[r] // copies for each r, zeros where r is a gap."""
    if not gaps:
        return rows_CD.index_select(0, order_R // copies)
    if not len(rows_CD):
        return rows_CD.new_zeros(len(order_R), rows_CD.shape[1])
    gathered_RD = rows_CD.index_select(0, order_R.clamp(min=0) // copies)
    return gathered_RD.masked_fill_((order_R < 0)[:, None], 0.0)


def _by_place(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    return rows_RD.index_select(0, place_TK.flatten()).unflatten(0, place_TK.shape)


def _gathered(x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    return _rows_by_copy(x_TD, order_R, place_TK.shape[1], len(order_R) > place_TK.numel())


def _weighted(y_RD: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    weighted_TKD = _by_place(y_RD, place_TK).to(wide).mul_(weights_TK[..., None].to(wide))
    # A conversion to the same dtype, as the last step, makes torch.compile of torch 2.11 lose the gradients.
    out_TD = weighted_TKD.sum(1)
    return out_TD if wide == y_RD.dtype else out_TD.to(y_RD.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return _gathered(x_TD, order_R, place_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return _by_place(gradients[0], place_TK).sum(1), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, order_R, place_TK, weights_TK)
        return _weighted(y_RD, place_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        y_RD, order_R, place_TK, weights_TK = ctx.saved_tensors
        (grad_TD,) = gradients
        wide = torch.promote_types(y_RD.dtype, torch.float32)
        grad_weights_TK = (_by_place(y_RD, place_TK).to(wide) @ grad_TD[..., None].to(wide)).squeeze(-1)
        gaps = len(order_R) > place_TK.numel()
        grad_RD = _rows_by_copy(grad_TD, order_R, place_TK.shape[1], gaps).to(wide)
        weight_R1 = _rows_by_copy(weights_TK.reshape(-1, 1), order_R, 1, gaps).to(wide)
        return grad_RD.mul_(weight_R1).to(y_RD.dtype), None, None, grad_weights_TK.to(weights_TK.dtype)


def permute(x_TD: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's row at the places of its copies, zeros in the gaps."""
    if not torch.is_grad_enabled():
        return _gathered(x_TD, order_R, place_TK)
    return _Permute.apply(x_TD, order_R, place_TK)


def unpermute(y_RD: Tensor, order_R: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ_k weights[t, k] · y[place[t, k]], in float32."""
    if not torch.is_grad_enabled():
        return _weighted(y_RD, place_TK, weights_TK)
    return _Unpermute.apply(y_RD, order_R, place_TK, weights_TK)
