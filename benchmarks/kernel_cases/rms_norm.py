"""The norm: two passes over memory forwards, five backwards included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from deepwright_kernels import backend_for

from .case import BYTES, Case, Settings, applied, implementations, with_gradients


def cases(settings: Settings) -> Iterator[Case]:
    shapes = [(16384, 2048), (16384, 7168), (128, 7168)] if settings.gpu else [(4096, 128), (4096, 512)]
    for tokens, width in shapes:
        x = torch.randn(tokens, width, device=settings.device, dtype=settings.dtype, requires_grad=True)
        weight = torch.ones(width, device=settings.device, requires_grad=True)
        functions = implementations(
            "rms_norm", settings, torch=lambda x, w, eps: F.rms_norm(x, w.shape, w.to(x.dtype), eps)
        )
        size, shape, backend = x.numel() * x.element_size(), f"{tokens} x {width}", backend_for("rms_norm", x)
        constants = (x.detach(), weight.detach(), 1e-6)
        yield Case("rms_norm", shape, applied(functions, *constants), 2 * size, BYTES, backend)
        training = with_gradients(functions, [x, weight], torch.randn_like(x), x, weight, 1e-6)
        yield Case("rms_norm + gradients", shape, training, 5 * size, BYTES, backend)
