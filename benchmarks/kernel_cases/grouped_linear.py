"""A linear layer for each group of rows, alone and with gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for

from .case import FLOPS, Case, Settings, applied, implementations, with_gradients

ON_GPU = [(32768, 8, 7168, 4096), (24576, 64, 2048, 2816)]
ON_CPU = [(4096, 8, 128, 128), (4096, 32, 64, 128)]


def cases(settings: Settings) -> Iterator[Case]:
    for tokens, groups, inputs, outputs in ON_GPU if settings.gpu else ON_CPU:
        x = torch.randn(tokens, inputs, device=settings.device, dtype=settings.dtype, requires_grad=True)
        weight = torch.randn(groups, outputs, inputs, device=settings.device) * 0.02
        weight = weight.to(settings.dtype).requires_grad_()
        counts = torch.randint(groups, (tokens,)).bincount(minlength=groups)
        ends = counts.cumsum(0).int().to(settings.device)
        # The reference reads the ends on the host, which torch.compile cannot follow.
        functions = implementations("grouped_linear", Settings(settings.device, settings.dtype, compiled=False))
        work, shape = 2 * tokens * inputs * outputs, f"{tokens} rows, {groups} x ({outputs}, {inputs})"
        backend = backend_for("grouped_linear", x, weight, ends)
        yield Case("grouped_linear", shape, applied(functions, x.detach(), weight.detach(), ends), work, FLOPS, backend)
        upstream = torch.randn(tokens, outputs, device=settings.device, dtype=settings.dtype)
        training = with_gradients(functions, [x, weight], upstream, x, weight, ends)
        yield Case("grouped_linear + gradients", shape, training, 3 * work, FLOPS, backend)
