"""Loss of a linear head: log-probabilities alone (one product has to be made), and with gradients (three).

`linear_cross_entropy` is asked for gradients with a weight for each token that comes with the backward pass, as a
policy loss does; `weighted_linear_cross_entropy` knows the weights beforehand, as a mean over tokens does, and so does
liger-kernel's fused loss. The memory includes the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepwright_kernels import backend_for

from .case import FLOPS, Case, Settings, applied, compiled, implementations, installed, with_gradients

ON_GPU = [(16384, 2048, 129280), (16384, 2048, 32768), (2048, 7168, 129280)]
ON_CPU = [(2048, 128, 4096)]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """As most training code has it."""
    return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none"),)


def plain_sum(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """The same, each token with its weight."""
    return (plain(hidden, weight, targets)[0] * token_weights).sum()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """The sum of the losses by liger-kernel, which takes no weights for tokens; those of this table are all equal."""
    module = installed("liger_kernel.ops.fused_linear_cross_entropy")
    assert module is not None
    #                                                                   bias, classes, ignored, z-loss, smoothing
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    loss: Tensor = apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]
    return loss / len(targets)


def cases(settings: Settings) -> Iterator[Case]:
    for tokens, width, vocabulary in ON_GPU if settings.gpu else ON_CPU:
        hidden = torch.randn(tokens, width, device=settings.device, dtype=settings.dtype, requires_grad=True)
        weight = (torch.randn(vocabulary, width, device=settings.device) * 0.02).to(settings.dtype).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), device=settings.device)
        work, shape = 2 * tokens * width * vocabulary, f"{tokens} x {width} -> {vocabulary}"

        name = "linear_cross_entropy"
        functions: dict[str, Callable[..., Any]] = implementations(name, settings, torch=plain)
        if settings.compiled:
            functions["compile torch"] = compiled(plain)
        backend = backend_for(name, hidden, weight, targets, -100, None, 1.0)
        runs = applied(functions, hidden.detach(), weight.detach(), targets)
        yield Case(name, shape, runs, work, FLOPS, backend)
        upstream = torch.rand(tokens, device=settings.device)
        runs = with_gradients(functions, [hidden, weight], upstream, hidden, weight, targets)
        yield Case(name, f"{shape}, with gradients", runs, 3 * work, FLOPS, backend)

        name, token_weights = "weighted_linear_cross_entropy", torch.full_like(upstream, 1 / tokens)
        functions = implementations(name, settings, torch=plain_sum)
        if settings.compiled:
            functions["compile torch"] = compiled(plain_sum)
        if settings.gpu and installed("liger_kernel.ops.fused_linear_cross_entropy") is not None:
            functions["liger"] = liger
        one = torch.ones((), device=settings.device)
        runs = with_gradients(functions, [hidden, weight], one, hidden, weight, targets, token_weights)
        backend = backend_for(name, hidden, weight, targets, token_weights, -100, 1.0)
        yield Case(name, f"{shape}, with gradients", runs, 3 * work, FLOPS, backend)
