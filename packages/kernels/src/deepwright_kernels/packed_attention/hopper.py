"""Causal attention over packed rows for Hopper: the host's side of `hopper.cu`.

Shapes: B rows, S positions, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import Kernel, TensorMap, kernel
from .registration import register
from .triton import LOG2_E, describable, ends_of

SOURCE = Path(__file__).with_name("hopper.cu")
OWN, HALF, CHUNK, THREADS = 128, 64, 64, 384
FORWARD_STAGES, BACKWARD_STAGES = 2, 3
BARRIER_BYTES = 256


def _kernel(name: str, q_BSHK: Tensor, value_width: int, **defines: int | str) -> Kernel:
    width = q_BSHK.shape[-1] + value_width
    shared_bytes = {
        "forward": 2 * (OWN * q_BSHK.shape[-1] + FORWARD_STAGES * OWN * width),
        "query_gradient": 2 * (OWN * width + BACKWARD_STAGES * HALF * width),
        "key_gradient": 2 * (OWN * width + BACKWARD_STAGES * HALF * width) + 8 * BACKWARD_STAGES * HALF,
    }[name] + BARRIER_BYTES
    chosen: dict[str, int | str] = {
        "KEY_CHUNKS": q_BSHK.shape[-1] // CHUNK,
        "VALUE_CHUNKS": value_width // CHUNK,
        "STARTS": 0,
        "POSITIONS": 0,
        "CARRY": 0,
        "FLOAT_OUT": 0,
        "INDEX_T": "int",
    }
    return kernel(SOURCE, f"packed_attention_{name}", chosen | defines, shared_bytes, q_BSHK.device)


def _index_type(*tensors: Tensor | None) -> str:
    return "long long" if any(t is not None and t.dtype == torch.int64 for t in tensors) else "int"


def _maps(rows: int, *tensors_BSHC: Tensor) -> tuple[TensorMap, ...]:
    """Tiles of `rows` positions and one chunk of one row's one head."""
    return tuple(TensorMap(tensor, (1, rows, 1, CHUNK)) for tensor in tensors_BSHC)


def attend(
    q_BSHK: Tensor,
    k_BNGK: Tensor,
    v_BNGV: Tensor,
    starts_BS: Tensor | None,
    positions_BS: Tensor | None,
    lengths_B: Tensor | None,
    carry: tuple[Tensor, Tensor] | None,
    out_BSHV: Tensor,
    sums_BHS: Tensor,
    offset: int,
    scale: float,
) -> None:
    """Start the forward kernel, which fills out_BSHV and sums_BHS."""
    batch, rows, heads, _ = q_BSHK.shape
    keys, kv_heads, value_width = v_BNGV.shape[1:]
    q, k, v = (describable(t) for t in (q_BSHK, k_BNGK, v_BNGV))
    indices, unused = (starts_BS, positions_BS, lengths_B), sums_BHS
    index_type = _index_type(*indices)
    dtype = torch.int64 if index_type == "long long" else torch.int32
    _kernel(
        "forward",
        q,
        value_width,
        STARTS=int(starts_BS is not None),
        POSITIONS=int(positions_BS is not None),
        CARRY=int(carry is not None),
        FLOAT_OUT=int(out_BSHV.dtype == torch.float32),
        INDEX_T=index_type,
    ).launch(
        (-(-rows // OWN), batch * heads, 1),
        (THREADS, 1, 1),
        *_maps(OWN, q, k, v),
        *(unused if t is None else t.to(dtype).contiguous() for t in indices),
        *(carry or (unused, unused)),
        out_BSHV,
        sums_BHS,
        rows,
        keys,
        offset,
        heads,
        heads // kv_heads,
        scale * LOG2_E.value,
    )


@torch.library.custom_op("deepwright::packed_attention_hopper", mutates_args=())
def _forward(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q_BSHK.shape
    out = torch.empty((batch, rows, heads, v_BSGV.shape[-1]), dtype=q_BSHK.dtype, device=q_BSHK.device)
    sums_BHS = torch.empty((batch, heads, rows), dtype=torch.float32, device=q_BSHK.device)
    if out.numel():
        attend(q_BSHK, k_BSGK, v_BSGV, starts_BS, None, None, None, out, sums_BHS, 0, scale)
    return out, sums_BHS


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
    defines: dict[str, int | str] = {"STARTS": int(starts_BS is not None), "INDEX_T": _index_type(starts_BS)}
    _kernel("query_gradient", q, value_width, **defines).launch(
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
    _kernel("key_gradient", q, value_width, **defines).launch(
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


register(_forward, _backward)


def packed_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> Tensor:
    """See the operator's docstring."""
    return _forward(q_BSHK, k_BSGK, v_BSGV, starts_BS, scale)[0]
