"""Loss of a linear head, with gradients: three products have to be made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from deepwright_kernels import backend_for

from .case import FLOPS, Case, Settings, implementations, with_gradients


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """As most training code has it."""
    return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none"),)


def cases(settings: Settings) -> Iterator[Case]:
    tokens, width, vocabulary = (16384, 2048, 129280) if settings.gpu else (2048, 128, 4096)
    hidden = torch.randn(tokens, width, device=settings.device, dtype=settings.dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=settings.device) * 0.02).to(settings.dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=settings.device)
    upstream = torch.rand(tokens, device=settings.device)
    functions = implementations("linear_cross_entropy", settings, torch=plain)
    training = with_gradients(functions, [hidden, weight], upstream, hidden, weight, targets)
    work = 3 * 2 * tokens * width * vocabulary
    yield Case(
        "linear_cross_entropy + gradients",
        f"{tokens} x {width} -> {vocabulary}",
        training,
        work,
        FLOPS,
        backend_for("linear_cross_entropy", hidden),
    )
