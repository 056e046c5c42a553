"""Dense products in block-scaled FP8 (forward and dgrad, then wgrad), operands quantised beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepwright_kernels import (
    backend_for,
    dispatch,
    fp8_matmul,
    operators,
    quantise_fp8_blocks,
    quantise_fp8_rows,
)

from .case import FP8_FLOPS, Case, Settings, applied, installed

# (outputs, inputs) of DeepSeek-V3's projections, at 4096 tokens.
ON_GPU = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
ON_CPU = [(256, 256)]


def peers(operator: str, ours: str, settings: Settings) -> dict[str, Callable[..., Any]]:
    """Our other backends for a GPU, of which `torch` is its scaled_mm, and the reference."""
    names = [name for name in ("cuda", "torch", "triton") if settings.gpu and name in operators()[operator]]
    return {name: dispatch.load(operator, name) for name in (*names, "reference") if name != ours}


def _deep_gemm() -> dict[str, Callable[..., Any]]:
    deep_gemm = installed("deep_gemm")
    if deep_gemm is None or not hasattr(deep_gemm, "fp8_gemm_nt"):
        return {}

    def run(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
        y_MN = torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype, device=a_MK.device)
        deep_gemm.fp8_gemm_nt((a_MK, a_scale_MV), (b_NK, b_scale), y_MN)
        return y_MN

    return {"deep_gemm": run}


def cases(settings: Settings) -> Iterator[Case]:
    tokens = 4096 if settings.gpu else 256
    for outputs, inputs in ON_GPU if settings.gpu else ON_CPU:
        x = torch.randn(tokens, inputs, device=settings.device, dtype=settings.dtype)
        weight = torch.randn(outputs, inputs, device=settings.device, dtype=settings.dtype)
        a, b = quantise_fp8_rows(x), quantise_fp8_blocks(weight)
        arguments = (*a, *b, torch.bfloat16)
        ours = backend_for("fp8_matmul", *arguments)
        functions = {"ours": fp8_matmul, **peers("fp8_matmul", ours, settings)}
        functions |= _deep_gemm() if settings.gpu else {}
        work, shape = 2 * tokens * outputs * inputs, f"{tokens} x ({outputs}, {inputs})"
        yield Case("fp8_matmul", shape, applied(functions, *arguments), work, FP8_FLOPS, ours)
    # The gradient of a weight of this size over so many tokens: scales of 1 x 128 on both sides, sums in float32.
    for rows, columns, summed in [(4096, 7168, 8192)] if settings.gpu else [(256, 256, 256)]:
        a = quantise_fp8_rows(torch.randn(rows, summed, device=settings.device, dtype=settings.dtype))
        b = quantise_fp8_rows(torch.randn(columns, summed, device=settings.device, dtype=settings.dtype))
        arguments = (*a, *b, torch.float32)
        ours = backend_for("fp8_matmul", *arguments)
        functions = {"ours": fp8_matmul, **peers("fp8_matmul", ours, settings)}
        shape = f"{rows} x {columns}, over {summed} tokens"
        work = 2 * rows * columns * summed
        yield Case("fp8_matmul, wgrad", shape, applied(functions, *arguments), work, FP8_FLOPS, ours)
