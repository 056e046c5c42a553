"""Quantising to FP8: every value is read once and written once for each direction; scales count as well."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepwright_kernels import backend_for, dispatch

from .case import BYTES, Case, Settings, applied, implementations

ACTIVATIONS_ON_GPU = [(16384, 7168), (16384, 2048), (128, 7168)]
ACTIVATIONS_ON_CPU = [(1024, 256)]
HIDDEN_ON_GPU = [(16384, 2048), (24576, 1408), (128, 2048)]
HIDDEN_ON_CPU = [(1024, 256)]
WEIGHTS_ON_GPU = [(4096, 7168), (64, 2816, 2048)]
WEIGHTS_ON_CPU = [(512, 256)]

DIRECTIONS = {"quantise_fp8_rows": 1, "quantise_fp8_columns": 1, "quantise_fp8_rows_and_columns": 2}


def _case(operator: str, shape: str, settings: Settings, amount: float, *arguments: object) -> Case:
    ours = backend_for(operator, *arguments)
    functions = implementations(operator, settings)
    if ours == "cuda":
        functions["triton"] = dispatch.load(operator, "triton")
    return Case(operator, shape, applied(functions, *arguments), amount, BYTES, ours)


def _written(values: int) -> float:
    """Bytes of e4m3 values and their float32 scales, one for 128 of them."""
    return values * (1 + 4 / 128)


def cases(settings: Settings) -> Iterator[Case]:
    for tokens, width in ACTIVATIONS_ON_GPU if settings.gpu else ACTIVATIONS_ON_CPU:
        x = torch.randn(tokens, width, device=settings.device, dtype=settings.dtype)
        for operator, directions in DIRECTIONS.items():
            amount = x.numel() * x.element_size() + directions * _written(x.numel())
            yield _case(operator, f"{tokens} x {width}", settings, amount, x, False)
    for tokens, hidden in HIDDEN_ON_GPU if settings.gpu else HIDDEN_ON_CPU:
        gate_up = torch.randn(tokens, 2 * hidden, device=settings.device, dtype=settings.dtype)
        grad = torch.randn(tokens, hidden, device=settings.device, dtype=settings.dtype)
        read, values = gate_up.numel() * gate_up.element_size(), grad.numel()
        shape = f"{tokens} x {hidden}"
        yield _case("swiglu_quantise_fp8", shape, settings, read + _written(values), gate_up, False)
        amount = 1.5 * read + 5 * _written(values)
        yield _case("swiglu_backward_quantise_fp8", shape, settings, amount, grad, gate_up, False)
    for sizes in WEIGHTS_ON_GPU if settings.gpu else WEIGHTS_ON_CPU:
        weight: Tensor = torch.randn(sizes, device=settings.device)
        for transposed in (False, True):
            shape = " x ".join(map(str, sizes)) + (" float32, transposed" if transposed else " float32")
            yield _case(
                "quantise_fp8_blocks", shape, settings, 5 * weight.numel(), weight, (128, 128), False, transposed
            )
