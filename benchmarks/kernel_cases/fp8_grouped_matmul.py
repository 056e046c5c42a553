"""Experts' products in block-scaled FP8: forward, dgrad, wgrad alone, and whole layers with what they quantise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepwright_kernels import (
    backend_for,
    fp8_grouped_feed_forward,
    fp8_grouped_linear,
    fp8_grouped_matmul,
    fp8_grouped_outer,
    grouped_linear,
    quantise_fp8_blocks,
    quantise_fp8_columns,
    quantise_fp8_rows,
)

from .case import FP8_FLOPS, Case, Settings, applied, installed, with_gradients
from .fp8_matmul import peers

# Groups, rows of each, outputs, inputs: a few large experts and many small ones, forward shapes.
ON_GPU = [(8, 4096, 4096, 7168), (8, 4096, 7168, 2048), (64, 384, 2816, 2048), (64, 384, 2048, 1408)]
ON_CPU = [(4, 128, 128, 128)]
# Groups, rows of each, inputs and outputs, hidden size.
FEED_FORWARDS_ON_GPU = [(8, 4096, 7168, 2048), (64, 384, 2048, 1408)]
FEED_FORWARDS_ON_CPU = [(4, 128, 128, 64)]


def _deep_gemm(groups: int, rows: int) -> dict[str, Callable[..., Any]]:
    deep_gemm = installed("deep_gemm")
    if deep_gemm is None or not hasattr(deep_gemm, "m_grouped_fp8_gemm_nt_contiguous"):
        return {}
    group_T = torch.arange(groups, dtype=torch.int32, device="cuda").repeat_interleave(rows)

    def run(a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, *_: object) -> Tensor:
        y_TN = torch.empty(a_TK.shape[0], b_ENK.shape[1], dtype=torch.bfloat16, device=a_TK.device)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a_TK, a_scale_TV), (b_ENK, b_scale_EUV), y_TN, group_T)
        return y_TN

    return {"deep_gemm": run}


def _feed_forward_in_bf16(x_TK: Tensor, gate_up_EJK: Tensor, down_ENI: Tensor, ends_E: Tensor) -> Tensor:
    gate_TI, up_TI = grouped_linear(x_TK, gate_up_EJK, ends_E).chunk(2, -1)
    return grouped_linear(F.silu(gate_TI) * up_TI, down_ENI, ends_E)


def cases(settings: Settings) -> Iterator[Case]:
    draw = {"device": settings.device, "dtype": settings.dtype}
    for groups, rows, outputs, inputs in ON_GPU if settings.gpu else ON_CPU:
        tokens = groups * rows
        ends = torch.arange(1, groups + 1, dtype=torch.int32, device=settings.device) * rows
        x, upstream = torch.randn(tokens, inputs, **draw), torch.randn(tokens, outputs, **draw)
        weight = torch.randn(groups, outputs, inputs, **draw)
        work, shape = 2 * tokens * outputs * inputs, f"{groups} x {rows} rows, ({outputs}, {inputs})"
        for what, rows_of, transposed in (("", x, False), (", dgrad", upstream, True)):
            b = quantise_fp8_blocks(weight, transposed=transposed)
            arguments = (*quantise_fp8_rows(rows_of), *b, ends, torch.bfloat16)
            ours = backend_for("fp8_grouped_matmul", *arguments)
            functions = {"ours": fp8_grouped_matmul, **peers("fp8_grouped_matmul", ours, settings)}
            functions |= _deep_gemm(groups, rows) if settings.gpu else {}
            yield Case(f"fp8_grouped_matmul{what}", shape, applied(functions, *arguments), work, FP8_FLOPS, ours)
        arguments = (*quantise_fp8_columns(upstream), *quantise_fp8_columns(x), ends, torch.float32)
        ours = backend_for("fp8_grouped_outer", *arguments)
        functions = {"ours": fp8_grouped_outer, **peers("fp8_grouped_outer", ours, settings)}
        yield Case("fp8_grouped_outer", shape, applied(functions, *arguments), work, FP8_FLOPS, ours)
        weight, x = weight.requires_grad_(), x.requires_grad_()
        layers = {"ours": fp8_grouped_linear, "grouped_linear bf16": grouped_linear}
        training = with_gradients(layers, [x, weight], upstream, x, weight, ends)
        yield Case("fp8_grouped_linear + gradients", shape, training, 3 * work, FP8_FLOPS, ours)
    for groups, rows, width, hidden in FEED_FORWARDS_ON_GPU if settings.gpu else FEED_FORWARDS_ON_CPU:
        tokens = groups * rows
        ends = torch.arange(1, groups + 1, dtype=torch.int32, device=settings.device) * rows
        x, upstream = torch.randn(tokens, width, **draw).requires_grad_(), torch.randn(tokens, width, **draw)
        gate_up = torch.randn(groups, 2 * hidden, width, **draw).requires_grad_()
        down = torch.randn(groups, width, hidden, **draw).requires_grad_()
        feed_forwards = {"ours": fp8_grouped_feed_forward, "grouped_linear bf16": _feed_forward_in_bf16}
        leaves = [x, gate_up, down]
        training = with_gradients(feed_forwards, leaves, upstream, *leaves, ends)
        work, shape = 18 * tokens * width * hidden, f"{groups} x {rows} rows, {width}, hidden {hidden}"
        yield Case("fp8_grouped_feed_forward + gradients", shape, training, work, FP8_FLOPS, "composed")
