"""The norm, alone and after an addition to the residual stream: two and four passes over memory forwards, five and
eight with the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepwright_kernels import backend_for

from .case import BYTES, Case, Settings, applied, implementations, installed, with_gradients

ON_GPU = [(16384, 2048), (16384, 7168), (65536, 512), (128, 7168)]
LIGER = "liger_kernel.transformers.functional"


def _torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def _torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return _torch_norm(summed, weight, eps), summed


def _liger(settings: Settings) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """liger-kernel's norm and fused addition, told to leave its arguments as they are."""
    liger = installed(LIGER) if settings.gpu else None
    if liger is None:
        return {}, {}

    def norm(x: Tensor, weight: Tensor, eps: float) -> Any:
        return liger.liger_rms_norm(x, weight, eps, 0.0, "llama", False)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        return liger.liger_fused_add_rms_norm(x, residual, weight, eps, 0.0, "llama", False)

    return {"liger": norm}, {"liger": add_norm} if hasattr(liger, "liger_fused_add_rms_norm") else {}


def cases(settings: Settings) -> Iterator[Case]:
    norm_peers, add_peers = _liger(settings)
    norms = implementations("rms_norm", settings, torch=_torch_norm, **norm_peers)
    add_norms = implementations("add_rms_norm", settings, torch=_torch_add_norm, **add_peers)
    for tokens, width in ON_GPU if settings.gpu else [(4096, 128), (4096, 512)]:
        x, residual = (
            torch.randn(tokens, width, device=settings.device, dtype=settings.dtype, requires_grad=True)
            for _ in range(2)
        )
        weight = torch.ones(width, device=settings.device, requires_grad=True)
        upstream = torch.randn_like(x)
        size, shape, backend = x.numel() * x.element_size(), f"{tokens} x {width}", backend_for("rms_norm", x)
        constants = (weight.detach(), 1e-6)
        yield Case("rms_norm", shape, applied(norms, x.detach(), *constants), 2 * size, BYTES, backend)
        training = with_gradients(norms, [x, weight], upstream, x, weight, 1e-6)
        yield Case("rms_norm + gradients", shape, training, 5 * size, BYTES, backend)

        forward = applied(add_norms, x.detach(), residual.detach(), *constants)
        yield Case("add_rms_norm", shape, forward, 4 * size, BYTES, backend_for("add_rms_norm", x))
        leaves = [x, residual, weight]

        def both(function: Callable[..., Any], leaves: list[Tensor] = leaves, upstream: Tensor = upstream) -> None:
            torch.autograd.grad(function(*leaves, 1e-6), leaves, (upstream, upstream))

        training = {name: (lambda function=function, both=both: both(function)) for name, function in add_norms.items()}
        yield Case("add_rms_norm + gradients", shape, training, 8 * size, BYTES, backend_for("add_rms_norm", x))
