"""Drawing the next token: logits read once, a number a row written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepwright_kernels import backend_for, draw_tokens

from .case import BYTES, Case, Settings, applied, implementations

# temperature, top_k, top_p
KINDS = {"greedy": (0.0, 0, 1.0), "drawn": (1.0, 0, 1.0), "top_p": (1.0, 0, 0.95), "top_k and top_p": (1.0, 50, 0.95)}


def _ours(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, any_random, any_truncated = arguments
    return draw_tokens(*tensors, any_random=any_random, any_truncated=any_truncated)


def cases(settings: Settings) -> Iterator[Case]:
    for rows, vocabulary in ((1, 129280), (256, 32768), (256, 129280)) if settings.gpu else ((8, 1024), (64, 32768)):
        logits = torch.randn(rows, vocabulary, device=settings.device) * 3
        numbers = torch.arange(rows, device=settings.device)
        for kind, (temperature, top_k, top_p) in KINDS.items():
            columns = [torch.full((rows,), value, device=settings.device) for value in (temperature, top_p, 0.0)]
            arguments = (
                logits,
                *columns,
                torch.full_like(numbers, top_k),
                numbers,
                numbers,
                temperature > 0,
                top_p < 1,
            )
            # Inductor cannot compile the reference's sums in float64 (torch 2.11).
            functions = implementations("draw_tokens", Settings(settings.device, settings.dtype, compiled=False))
            runs = applied(functions | {"ours": _ours}, *arguments)
            moved, backend = logits.numel() * logits.element_size(), backend_for("draw_tokens", *arguments)
            yield Case("draw_tokens", f"{rows} x {vocabulary}, {kind}", runs, moved, BYTES, backend)
