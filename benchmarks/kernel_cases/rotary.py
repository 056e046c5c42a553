"""The rotation of pairs: two passes over memory, four with its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for

from .case import BYTES, Case, Settings, applied, implementations, with_gradients


def cases(settings: Settings) -> Iterator[Case]:
    batch, tokens, heads, width = (4, 4096, 128, 64) if settings.gpu else (8, 512, 4, 32)
    x = torch.randn(batch, tokens, heads, width, device=settings.device, dtype=settings.dtype, requires_grad=True)
    angle = torch.rand(tokens, 1, width // 2, device=settings.device)
    cos, sin = angle.cos(), angle.sin()
    functions, size = implementations("rotary", settings), x.numel() * x.element_size()
    shape, backend = f"{batch} x {tokens} x {heads} x {width}", backend_for("rotary", x)
    yield Case("rotary", shape, applied(functions, x.detach(), cos, sin), 2 * size, BYTES, backend)
    training = with_gradients(functions, [x], torch.randn_like(x), x, cos, sin)
    yield Case("rotary + gradients", shape, training, 4 * size, BYTES, backend)
