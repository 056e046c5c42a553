"""The writer of the latent cache: each token's row is read once and its slot written once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for
from deepwright_kernels.mla_paged_decode.reference import fp8_row_bytes

from .case import BYTES, Case, Settings, applied, implementations


def cases(settings: Settings) -> Iterator[Case]:
    latent, rope = (512, 64) if settings.gpu else (128, 16)
    for tokens in (16384, 128) if settings.gpu else (1024,):
        kv = torch.randn(tokens, latent + rope, device=settings.device, dtype=settings.dtype)
        angle = torch.rand(tokens, rope // 2, device=settings.device)
        slots = torch.randperm(2 * tokens, device=settings.device)[:tokens]
        fp8_width = fp8_row_bytes(latent, rope)
        for kind, dtype, width in (("", settings.dtype, latent + rope), (" in FP8", torch.uint8, fp8_width)):
            cache = torch.zeros(2 * tokens, width, device=settings.device, dtype=dtype)
            arguments = (kv, torch.ones(latent, device=settings.device), 1e-6, angle.cos(), angle.sin(), cache, slots)
            runs = applied(implementations("latent_cache_write", settings), *arguments)
            moved = kv.numel() * kv.element_size() + tokens * width * cache.element_size()
            shape, backend = f"{tokens} x {latent} + {rope}{kind}", backend_for("latent_cache_write", *arguments)
            yield Case("latent_cache_write", shape, runs, moved, BYTES, backend)
