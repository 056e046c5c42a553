"""Muon's Newton-Schulz, five steps: the operations of the three products in full, whatever half of a symmetric one is
left out, so that a rate may pass that of a plain product."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for, dispatch

from .case import FLOPS, Case, Settings, applied, implementations

ON_GPU = [(64, 2816, 2048), (12, 2048, 2048), (4, 7168, 2048)]
STEPS = 5


def cases(settings: Settings) -> Iterator[Case]:
    peers = {"torch": dispatch.load("newton_schulz", "torch")} if settings.gpu else {}
    functions = implementations("newton_schulz", settings, **peers)
    for count, rows, columns in ON_GPU if settings.gpu else [(4, 256, 128)]:
        matrices = torch.randn(count, rows, columns, device=settings.device, dtype=settings.dtype)
        short, long = sorted((rows, columns))
        amount = 2 * STEPS * count * (2 * short * short * long + short**3)
        backend = backend_for("newton_schulz", matrices, STEPS)
        shape = f"{count} x {rows} x {columns}"
        yield Case("newton_schulz", shape, applied(functions, matrices, STEPS), amount, FLOPS, backend)
