"""Loss of a linear head: with gradients (three products have to be made), and log-probabilities alone (one).

The gradients are asked for with another weight for each token, which is what a policy loss does. liger-kernel's fused
loss makes its gradients in the forward pass and can only scale them afterwards, so it is beside the sum of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepwright_kernels import backend_for

from .case import FLOPS, Case, Run, Settings, applied, implementations, installed, with_gradients

ON_GPU = [(16384, 2048, 129280), (16384, 2048, 32768), (2048, 7168, 129280)]
ON_CPU = [(2048, 128, 4096)]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """As most training code has it."""
    return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none"),)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Run | None:
    """The sum of the losses and its gradients by liger-kernel, if it is here."""
    module = installed("liger_kernel.ops.fused_linear_cross_entropy")
    if module is None or hidden.device.type != "cuda":
        return None
    fused = module.LigerFusedLinearCrossEntropyFunction

    def run() -> None:
        #             bias, class weights, ignored, z-loss, smoothing, reduction
        loss = fused.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]
        torch.autograd.grad(loss, (hidden, weight))

    return run


def cases(settings: Settings) -> Iterator[Case]:
    for tokens, width, vocabulary in ON_GPU if settings.gpu else ON_CPU:
        hidden = torch.randn(tokens, width, device=settings.device, dtype=settings.dtype, requires_grad=True)
        weight = (torch.randn(vocabulary, width, device=settings.device) * 0.02).to(settings.dtype).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), device=settings.device)
        functions: dict[str, Callable[..., Any]] = implementations("linear_cross_entropy", settings, torch=plain)
        if settings.compiled:
            functions["compile torch"] = torch.compile(plain)
        work, shape = 2 * tokens * width * vocabulary, f"{tokens} x {width} -> {vocabulary}"
        backend = backend_for("linear_cross_entropy", hidden, weight, targets, -100, None, 1.0)
        alone = applied(functions, hidden.detach(), weight.detach(), targets)
        yield Case("linear_cross_entropy", shape, alone, work, FLOPS, backend)
        upstream = torch.rand(tokens, device=settings.device)
        runs = with_gradients(functions, [hidden, weight], upstream, hidden, weight, targets)
        other = liger(hidden, weight, targets)
        if other is not None:
            runs["liger"] = other
        yield Case("linear_cross_entropy + gradients", shape, runs, 3 * work, FLOPS, backend)
