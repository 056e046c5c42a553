"""The router: logits read once, scores written once, and the little that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepwright_kernels import backend_for, dispatch, route

from .case import BYTES, Case, Settings, applied, compiled, with_gradients

# tokens, experts, top_k, groups, top_groups: V3, Kimi K2, V2-Lite; the last two when decoding.
ON_GPU = [
    (16384, 256, 8, 8, 4),
    (16384, 384, 8, 1, 1),
    (16384, 64, 6, 1, 1),
    (128, 256, 8, 8, 4),
    (128, 64, 6, 1, 1),
]
ON_CPU = [(4096, 64, 6, 1, 1), (4096, 64, 4, 8, 4)]


def _ours(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    scoring: str,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, ...]:
    return route(
        logits_TE,
        bias_E,
        top_k,
        scoring=scoring,
        groups=groups,
        top_groups=top_groups,
        group_best=group_best,
        normalise=normalise,
        scaling=scaling,
    )


def _weights(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments)[1]


def cases(settings: Settings) -> Iterator[Case]:
    reference = dispatch.load("route", "reference")
    for tokens, experts, top_k, groups, top_groups in ON_GPU if settings.gpu else ON_CPU:
        logits_TE = torch.randn(tokens, experts, device=settings.device, requires_grad=True)
        bias_E = torch.randn(experts, device=settings.device) * 0.01
        rest = (bias_E, top_k, "sigmoid", groups, top_groups, 2, True, 2.5)
        functions: dict[str, Callable[..., Any]] = {"ours": _ours, "eager": reference}
        if settings.compiled:
            functions["compile"] = compiled(reference)
        size, chosen = logits_TE.numel() * 4, tokens * top_k * (8 + 4)
        shape = f"{tokens} x {experts}, top {top_k}, groups {top_groups}/{groups}"
        backend = backend_for("route", logits_TE, *rest)
        runs = applied(functions, logits_TE.detach(), *rest)
        yield Case("route", shape, runs, 2 * size + chosen, BYTES, backend)
        differentiated = {name: _weights(function) for name, function in functions.items()}
        upstream = torch.randn(tokens, top_k, device=settings.device)
        training = with_gradients(differentiated, [logits_TE], upstream, logits_TE, *rest)
        yield Case("route + gradients", shape, training, 4 * size + 2 * chosen, BYTES, backend)
