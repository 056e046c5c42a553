"""What torch has to know of a pair of attention kernels: shapes for tracing, and that one is the other's gradient.

Shapes: B rows, S positions, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def _forward_shapes(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q_BSHK.shape
    return (
        q_BSHK.new_empty((batch, rows, heads, v_BSGV.shape[-1])),
        q_BSHK.new_empty((batch, heads, rows), dtype=torch.float32),
    )


def _backward_shapes(
    grad: Tensor,
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    starts_BS: Tensor | None,
    out_BSHV: Tensor,
    sums_BHS: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q_BSHK, k_BSGK, v_BSGV))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, starts, *output)


def register(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """`forward` gives the result and the log-sum-exps, `backward` the gradients of queries, keys and values."""
    forward.register_fake(_forward_shapes)
    backward.register_fake(_backward_shapes)

    def gradients(ctx: Any, grad: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grad, *ctx.saved_tensors, ctx.scale), None, None)

    forward.register_autograd(gradients, setup_context=_keep)
