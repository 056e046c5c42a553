"""Drawing the next token: logits read once, a number a row written."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for

from .case import BYTES, Case, Settings, applied, implementations


def cases(settings: Settings) -> Iterator[Case]:
    for rows, vocabulary in ((1, 129280), (256, 32768), (256, 129280)) if settings.gpu else ((8, 1024), (64, 32768)):
        logits = torch.randn(rows, vocabulary, device=settings.device)
        numbers = torch.arange(rows, device=settings.device)
        for kind, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            temperatures = torch.full((rows,), temperature, device=settings.device)
            arguments = (logits, temperatures, numbers, numbers, 1e-5, temperature > 0)
            runs = applied(implementations("token_race", settings), *arguments)
            moved, backend = logits.numel() * logits.element_size(), backend_for("token_race", *arguments)
            yield Case("token_race", f"{rows} x {vocabulary}, {kind}", runs, moved, BYTES, backend)
