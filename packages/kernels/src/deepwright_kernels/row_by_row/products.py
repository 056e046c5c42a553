"""Matrix products in which no row knows of another.

On a CPU rows are multiplied in tiles of a fixed number, padded with zeros, each with a call of its own: a library then
sees one shape, and treats its rows alike. On a GPU a Triton kernel has one tile for each pair of widths, whatever the
number of rows, and sums over the inner dimension in order.

Shapes: Z matrices, T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 16  # of a tile on a CPU
_mm = torch.ops.aten.mm.out  # not torch.mm, in whose place the context puts what is here


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x [..., K] Wᵀ + bias -> [..., N]."""
    y = matmul(x, weight_NK.T)
    return y if bias_N is None else y + bias_N


def matmul(x: Tensor, w: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [..., T, K] times w [K, N], or w [..., K, N] with the same leading dimensions."""
    if out is not None:
        return out.copy_(matmul(x, w, out_dtype=out_dtype))
    if w.ndim == 2:
        return rows(x.reshape(-1, x.shape[-1])[None], w[None], out_dtype)[0].view(*x.shape[:-1], w.shape[-1])
    if x.ndim < 3 or x.shape[:-2] != w.shape[:-2]:
        raise NotImplementedError(
            f"A product of shapes {list(x.shape)} and {list(w.shape)} has no form for each row by itself; expected one "
            "matrix for all rows, or the same leading dimensions."
        )
    return rows(x.flatten(0, -3), w.flatten(0, -3), out_dtype).view(*x.shape[:-1], w.shape[-1])


def rows(x_ZTK: Tensor, w_ZKN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x_ZTK times w_ZKN -> [Z, T, N] in x's dtype, or in another."""
    if x_ZTK.is_cuda:
        from . import triton  # a machine without it never looks for it

        return triton.rows(x_ZTK, w_ZKN, dtype)
    if dtype is not None:
        x_ZTK, w_ZKN = x_ZTK.to(dtype), w_ZKN.to(dtype)
    matrices, count, _ = x_ZTK.shape
    outputs = w_ZKN.shape[-1]
    tiles = -(-count // ROWS)
    padded_ZTK = functional.pad(x_ZTK, (0, 0, 0, tiles * ROWS - count)).contiguous()
    y_ZTN = x_ZTK.new_empty(matrices, tiles * ROWS, outputs)
    for matrix in range(matrices):
        for first in range(0, tiles * ROWS, ROWS):
            tile = slice(first, first + ROWS)
            _mm(padded_ZTK[matrix, tile], w_ZKN[matrix], out=y_ZTN[matrix, tile])
    return y_ZTN[:, :count]


def grouped(x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """Row r of group e times weight_eᵀ; rows past the last end are zeros."""
    if x_RK.is_cuda:
        from . import triton

        return triton.grouped(x_RK, weight_ENK, ends_E)
    y_RN = x_RK.new_zeros(len(x_RK), weight_ENK.shape[1])
    begin = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > begin:
            y_RN[begin:end] = rows(x_RK[None, begin:end], weight_ENK[group].T[None])[0]
        begin = end
    return y_RN
