"""Absorbed decode over a paged latent cache: the cache has to be read once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for

from .case import BYTES, Case, Settings, applied, implementations

ON_GPU = [(128, 16, 4096), (128, 128, 4096), (1, 128, 32768)]


def cases(settings: Settings) -> Iterator[Case]:
    latent, rope, block = (512, 64, 64) if settings.gpu else (64, 16, 16)
    for batch, heads, length in ON_GPU if settings.gpu else [(32, 4, 512)]:
        pages, width = -(-length // block), latent + rope
        cache = torch.randn((batch * pages + 1) * block, width, device=settings.device, dtype=settings.dtype)
        blocks = (torch.randperm(batch * pages, device=settings.device) + 1).view(batch, pages)
        lengths = torch.full((batch,), length, device=settings.device)
        arguments = (
            torch.randn(batch, 1, heads, latent, device=settings.device, dtype=settings.dtype),
            torch.randn(batch, 1, heads, rope, device=settings.device, dtype=settings.dtype),
            cache,
            blocks,
            lengths[:, None] - 1,
            lengths,
            block,
            (128 + rope) ** -0.5,
        )
        runs = applied(implementations("mla_paged_decode", settings), *arguments)
        moved = batch * length * width * cache.element_size()
        shape = f"{batch} sequences x {length}, {heads} heads"
        yield Case("mla_paged_decode", shape, runs, moved, BYTES, backend_for("mla_paged_decode", *arguments))
