"""Local dispatch: tokens into expert order and back, with no host synchronisation and no loop over experts.

Both directions are gathers, in the backward pass too: the order is a permutation, so the gradient of a gather by it
is a gather by its inverse. (Autograd's own backward of indexing is a scatter-add: slower, and not deterministic.)

Shapes: T tokens, K experts per token, X = T·K routed copies, D width, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """order_X: routed copy at each place of expert order. inverse_X: place of each routed copy.
    load_E: copies for each expert. ends_E: where each expert's copies end, int32."""

    order_X: Tensor
    inverse_X: Tensor
    load_E: Tensor
    ends_E: Tensor


def plan(experts_TK: Tensor, experts: int) -> Dispatch:
    """Sort the routed copies by expert; stable, so copies of one expert keep the tokens' order."""
    flat_X = experts_TK.flatten()
    order_X = flat_X.argsort(stable=True)
    inverse_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
    load_E = torch.zeros(experts, dtype=torch.int64, device=flat_X.device).scatter_add_(
        0, flat_X, torch.ones_like(flat_X)
    )
    return Dispatch(order_X, inverse_X, load_E, load_E.cumsum(0).to(torch.int32))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_X: Tensor, inverse_X: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_X)
        ctx.copies = copies
        return x_TD.index_select(0, order_X // copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_X,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse_X).unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_XD: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
        ctx.save_for_backward(order_X)
        return y_XD.index_select(0, inverse_X)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order_X,) = ctx.saved_tensors
        return gradients[0].index_select(0, order_X), None, None


def permute(x_TD: Tensor, dispatch: Dispatch, copies: int) -> Tensor:
    """Each token's row, once for each of its experts, in expert order. [T, D] -> [X, D]."""
    return _Permute.apply(x_TD, dispatch.order_X, dispatch.inverse_X, copies)


def unpermute(y_XD: Tensor, dispatch: Dispatch, weights_TK: Tensor) -> Tensor:
    """The experts' outputs back in token order, summed with the router's weights. [X, D] -> [T, D]."""
    y_TKD = _Unpermute.apply(y_XD, dispatch.order_X, dispatch.inverse_X).unflatten(0, weights_TK.shape)
    return (y_TKD * weights_TK[..., None].to(y_TKD.dtype)).sum(1)
