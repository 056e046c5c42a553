"""Causal attention over packed rows for Hopper: the host's side of `hopper.cu`.

Shapes: B rows, S positions, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import Kernel, TensorMap, kernel
from .triton import LOG2_E, describable, ends_of

SOURCE = Path(__file__).with_name("hopper.cu")
OWN, HALF, CHUNK, THREADS = 128, 64, 64, 384
FORWARD_STAGES, BACKWARD_STAGES = 2, 3
BARRIER_BYTES = 128


def _kernel(name: str, q_BSHK: Tensor, value_width: int, starts_BS: Tensor | None) -> Kernel:
    width = q_BSHK.shape[-1] + value_width
    shared_bytes = {
        "forward": 2 * (OWN * q_BSHK.shape[-1] + FORWARD_STAGES * OWN * width),
        "query_gradient": 2 * (OWN * width + BACKWARD_STAGES * HALF * width),
        "key_gradient": 2 * (OWN * width + BACKWARD_STAGES * HALF * width) + 8 * BACKWARD_STAGES * HALF,
    }[name] + BARRIER_BYTES
    defines: dict[str, int | str] = {
        "KEY_CHUNKS": q_BSHK.shape[-1] // CHUNK,
        "VALUE_CHUNKS": value_width // CHUNK,
        "STARTS": int(starts_BS is not None),
        "STARTS_T": "long long" if starts_BS is not None and starts_BS.dtype == torch.int64 else "int",
    }
    return kernel(SOURCE, f"packed_attention_{name}", defines, shared_bytes, q_BSHK.device)


def _maps(rows: int, *tensors_BSHC: Tensor) -> tuple[TensorMap, ...]:
    """Tiles of `rows` positions and one chunk of one row's one head."""
    return tuple(TensorMap(tensor, (1, rows, 1, CHUNK)) for tensor in tensors_BSHC)


@torch.library.custom_op("deepwright::packed_attention_hopper", mutates_args=())
def _forward(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q_BSHK.shape
    kv_heads, value_width = v_BSGV.shape[2:]
    out = torch.empty((batch, rows, heads, value_width), dtype=q_BSHK.dtype, device=q_BSHK.device)
    sums_BHS = torch.empty((batch, heads, rows), dtype=torch.float32, device=q_BSHK.device)
    if out.numel() == 0:
        return out, sums_BHS
    q, k, v = (describable(t) for t in (q_BSHK, k_BSGK, v_BSGV))
    _kernel("forward", q, value_width, starts_BS).launch(
        (-(-rows // OWN), batch * heads, 1),
        (THREADS, 1, 1),
        *_maps(OWN, q, k, v),
        sums_BHS if starts_BS is None else starts_BS.contiguous(),
        out,
        sums_BHS,
        rows,
        heads,
        heads // kv_heads,
        scale * LOG2_E.value,
    )
    return out, sums_BHS


@_forward.register_fake
def _(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q_BSHK.shape
    return (
        q_BSHK.new_empty((batch, rows, heads, v_BSGV.shape[-1])),
        q_BSHK.new_empty((batch, heads, rows), dtype=torch.float32),
    )


@torch.library.custom_op("deepwright::packed_attention_hopper_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    starts_BS: Tensor | None,
    out_BSHV: Tensor,
    sums_BHS: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, heads, _ = q_BSHK.shape
    kv_heads, value_width = v_BSGV.shape[2:]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q_BSHK, k_BSGK, v_BSGV))
    if out_BSHV.numel() == 0:
        return dq, dk, dv
    grad, q, k, v = (describable(t) for t in (grad, q_BSHK, k_BSGK, v_BSGV))
    delta_BHS = torch.empty_like(sums_BHS)
    tiles, sizes = -(-rows // OWN), (rows, heads, heads // kv_heads, scale)
    _kernel("query_gradient", q, value_width, starts_BS).launch(
        (tiles, batch * heads, 1),
        (THREADS, 1, 1),
        *_maps(OWN, q, grad),
        *_maps(HALF, k, v),
        sums_BHS if starts_BS is None else starts_BS.contiguous(),
        out_BSHV,
        sums_BHS,
        delta_BHS,
        dq,
        *sizes,
    )
    _kernel("key_gradient", q, value_width, starts_BS).launch(
        (tiles, batch * kv_heads, 1),
        (THREADS, 1, 1),
        *_maps(HALF, q, grad),
        *_maps(OWN, k, v),
        sums_BHS if starts_BS is None else ends_of(starts_BS),
        sums_BHS,
        delta_BHS,
        dk,
        dv,
        *sizes,
    )
    return dq, dk, dv


@_backward.register_fake
def _(
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


def _keep(ctx, inputs, output) -> None:
    q, k, v, starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, starts, *output)


def _gradients(ctx, grad, _grad_sums):
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def packed_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> Tensor:
    """See the operator's docstring."""
    return _forward(q_BSHK, k_BSGK, v_BSGV, starts_BS, scale)[0]
