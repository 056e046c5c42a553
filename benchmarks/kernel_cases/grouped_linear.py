"""A linear layer for each group of rows, alone and with gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for, dispatch

from .case import FLOPS, Case, Settings, applied, implementations, with_gradients

# groups, rows of each, outputs, inputs: the shapes of DeepGEMM's tables, and V2-Lite's experts.
ON_GPU = [(8, 4096, 4096, 7168), (8, 4096, 7168, 2048), (64, 384, 2816, 2048), (64, 384, 2048, 1408)]
ON_CPU = [(8, 512, 128, 128), (32, 128, 128, 64)]


def cases(settings: Settings) -> Iterator[Case]:
    for groups, rows, outputs, inputs in ON_GPU if settings.gpu else ON_CPU:
        tokens = groups * rows
        x = torch.randn(tokens, inputs, device=settings.device, dtype=settings.dtype, requires_grad=True)
        weight = torch.randn(groups, outputs, inputs, device=settings.device) * 0.02
        weight = weight.to(settings.dtype).requires_grad_()
        # Groups of uneven sizes around the mean, as routers make them.
        counts = torch.randint(groups, (tokens,), generator=torch.Generator().manual_seed(0)).bincount(minlength=groups)
        uneven = counts.cumsum(0).int().to(settings.device)
        even = (torch.arange(1, groups + 1, device=settings.device) * rows).int()
        # The reference reads the ends on the host, which torch.compile cannot follow.
        functions = implementations("grouped_linear", Settings(settings.device, settings.dtype, compiled=False))
        functions["torch"] = dispatch.load("grouped_linear", "torch")
        work, backend = 2 * tokens * inputs * outputs, backend_for("grouped_linear", x, weight, even)
        if settings.gpu and backend != "triton":
            functions["triton"] = dispatch.load("grouped_linear", "triton")
        for label, ends in (("", even), (" uneven", uneven)):
            shape = f"{groups} x {rows}{label} rows, ({outputs}, {inputs})"
            constants = (x.detach(), weight.detach(), ends)
            yield Case("grouped_linear", shape, applied(functions, *constants), work, FLOPS, backend)
        upstream = torch.randn(tokens, outputs, device=settings.device, dtype=settings.dtype)
        training = with_gradients(functions, [x, weight], upstream, x, weight, uneven)
        yield Case("grouped_linear + gradients", shape, training, 3 * work, FLOPS, backend)
