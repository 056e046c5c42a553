"""The rotation of pairs: two passes over memory, four with its gradient. Of whole vectors, and of the tail of queries
[nope | rope], where slicing, turning and joining is the peer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepwright_kernels import backend_for, rotary

from .case import BYTES, Case, Settings, applied, implementations, with_gradients


def _sliced_and_joined(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = 2 * cos.shape[-1]
    kept, tail = x.split([x.shape[-1] - rotated, rotated], -1)
    return torch.cat((kept, rotary(tail, cos, sin)), -1)


def cases(settings: Settings) -> Iterator[Case]:
    batch, tokens, heads, kept, width = (4, 4096, 128, 128, 64) if settings.gpu else (8, 512, 4, 64, 32)
    angle = torch.rand(tokens, 1, width // 2, device=settings.device)
    cos, sin = angle.cos(), angle.sin()
    q = torch.randn(batch, tokens, heads, kept + width, device=settings.device, dtype=settings.dtype)
    whole, tails = implementations("rotary", settings), implementations("rotary_tail", settings)
    leading = f"{batch} x {tokens} x {heads} x"

    x = torch.randn(*q.shape[:-1], width, device=settings.device, dtype=settings.dtype, requires_grad=True)
    size, backend = x.numel() * x.element_size(), backend_for("rotary", x)
    yield Case("rotary", f"{leading} {width}", applied(whole, x.detach(), cos, sin), 2 * size, BYTES, backend)
    training = with_gradients(whole, [x], torch.randn_like(x), x, cos, sin)
    yield Case("rotary + gradients", f"{leading} {width}", training, 4 * size, BYTES, backend)
    sliced = applied(whole, q[..., kept:], cos, sin)
    yield Case("rotary", f"{leading} {width} of {kept + width}", sliced, 2 * size, BYTES, backend)

    tails["slice and cat"] = _sliced_and_joined
    size, backend, shape = q.numel() * q.element_size(), backend_for("rotary_tail", q), f"{leading} {kept} + {width}"
    yield Case("rotary_tail", shape, applied(tails, q, cos, sin), 2 * size, BYTES, backend)
    training = with_gradients(tails, [q.requires_grad_()], torch.randn_like(q), q, cos, sin)
    yield Case("rotary_tail + gradients", shape, training, 4 * size, BYTES, backend)
