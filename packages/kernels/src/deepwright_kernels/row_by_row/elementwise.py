"""Exponentials and logarithms on a CPU that give an element the same bits wherever it stands.

Torch's loops treat most of a tensor in vectors and its end, or the end of each thread's part, in scalars, whose
exponential is another implementation. Here the tensor is padded to whole vectors and cut into pieces that one thread
takes, so that no element is ever at such an end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Not torch.exp and so on, in whose place the context puts what is here.
aten = torch.ops.aten

# More than two vectors of the widest instructions, for the narrowest type; and torch's smallest part of a thread.
WHOLE, PIECE = 128, 16384


def _in_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not x.numel():
        return function(x)
    padded = functional.pad(x.reshape(-1), (0, -x.numel() % WHOLE))
    if len(padded) <= PIECE:
        done = function(padded)
    else:
        done = torch.cat([function(piece.clone()) for piece in padded.split(PIECE)])
    return done[: x.numel()].view(x.shape)


def exp(x: Tensor) -> Tensor:
    """e to the power of each element."""
    return _in_vectors(aten.exp, x)


def log(x: Tensor) -> Tensor:
    """The natural logarithm of each element."""
    return _in_vectors(aten.log, x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _in_vectors(aten.sigmoid, x)


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """x · sigmoid(x). inplace is torch's, and changes nothing."""
    return _in_vectors(aten.silu, x)
