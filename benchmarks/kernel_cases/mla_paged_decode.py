"""Absorbed decode over a paged latent cache.

With few heads the cache has to be read once and that is all the time there is: bytes. With 128 heads of one or more
queries the products take longer: operations, of the keys that exist. FlashMLA is the peer where it can be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepwright_kernels import backend_for, configure, dispatch
from deepwright_kernels.mla_paged_decode.reference import pack_fp8_latents

from .case import BYTES, FLOPS, Case, Settings, applied, implementations, installed

# Rows (query, head) from which on the matrix units are the limit and not the memory.
MANY_ROWS = 64


@dataclass(frozen=True)
class Shape:
    """lengths: of each sequence."""

    lengths: list[int]
    heads: int
    queries: int = 1
    fp8: bool = False
    mixed: bool = False

    def __str__(self) -> str:
        length = f"{min(self.lengths)}-{max(self.lengths)}" if self.mixed else str(self.lengths[0])
        parts = [f"{len(self.lengths)} x {length}", f"{self.heads} heads"]
        parts += [f"{self.queries} queries"] if self.queries > 1 else []
        return ", ".join(parts + (["fp8 cache"] if self.fp8 else []))


def mixed(batch: int, shortest: int, longest: int) -> list[int]:
    """Lengths as requests have them: as many in each doubling."""
    ratio = longest / shortest
    return [int(shortest * ratio ** (index / (batch - 1))) for index in range(batch)]


ON_GPU = [
    Shape([512], 16),
    Shape([4096] * 128, 16),
    Shape([8192] * 128, 16),
    Shape([1024] * 256, 16),
    Shape(mixed(64, 256, 32768), 16, mixed=True),
    Shape([4096] * 128, 16, queries=2),
    Shape([4096] * 128, 128),
    Shape([32768], 128),
    Shape([4096] * 128, 16, fp8=True),
    Shape([4096] * 128, 128, fp8=True),
]
ON_CPU = [Shape([512] * 32, 4)]


def flash_mla(arguments: tuple[Any, ...]) -> Callable[[], Tensor] | None:
    """FlashMLA's own decode with these arguments; its plan, made once a step for all layers, is not timed."""
    module = installed("flash_mla")
    if module is None:
        return None
    q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, _, lengths_B, block_size, scale = arguments
    q_BQHW = torch.cat((q_latent_BQHC, q_rope_BQHR), -1)
    queries, heads, latent = q_latent_BQHC.shape[1:]
    lengths_B, blocks_BP = lengths_B.int(), blocks_BP.int()
    pages = cache_NW.view(-1, block_size, 1, cache_NW.shape[-1])
    plan = module.get_mla_metadata(lengths_B, queries * heads, 1)

    def run() -> Tensor:
        out: Tensor = module.flash_mla_with_kvcache(
            q_BQHW, pages, blocks_BP, lengths_B, latent, *plan, softmax_scale=scale, causal=True
        )[0]
        return out

    return run


def can_run(backend: str, arguments: tuple[Any, ...]) -> bool:
    with configure({"mla_paged_decode": backend}):
        try:
            backend_for("mla_paged_decode", *arguments)
        except ValueError:
            return False
    return True


def cases(settings: Settings) -> Iterator[Case]:
    latent, rope, block = (512, 64, 64) if settings.gpu else (64, 16, 16)
    functions = implementations("mla_paged_decode", settings)
    for shape in ON_GPU if settings.gpu else ON_CPU:
        batch, longest = len(shape.lengths), max(shape.lengths)
        pages = -(-longest // block)
        cache = torch.randn((batch * pages + 1) * block, latent + rope, device=settings.device, dtype=settings.dtype)
        if shape.fp8:
            cache = pack_fp8_latents(cache[:, :latent], cache[:, latent:])
        lengths = torch.tensor(shape.lengths, device=settings.device)
        arguments = (
            torch.randn(batch, shape.queries, shape.heads, latent, device=settings.device, dtype=settings.dtype),
            torch.randn(batch, shape.queries, shape.heads, rope, device=settings.device, dtype=settings.dtype),
            cache,
            (torch.randperm(batch * pages, device=settings.device) + 1).view(batch, pages),
            lengths[:, None] - shape.queries + torch.arange(shape.queries, device=settings.device),
            lengths,
            block,
            (128 + rope) ** -0.5,
        )
        runs = applied(functions, *arguments)
        backend = backend_for("mla_paged_decode", *arguments)
        for other in {"cuda", "triton"} - {backend}:
            if can_run(other, arguments):
                runs[other] = partial(dispatch.load("mla_paged_decode", other), *arguments)
        peer = None if shape.fp8 or not settings.gpu else flash_mla(arguments)
        if peer is not None:
            runs["flash_mla"] = peer
        keys, rows = sum(shape.lengths), shape.queries * shape.heads
        many = rows >= MANY_ROWS
        amount = 2 * keys * rows * (2 * latent + rope) if many else keys * cache.shape[1] * cache.element_size()
        unit = FLOPS if many else BYTES
        yield Case("mla_paged_decode", str(shape), runs, amount, unit, backend)
