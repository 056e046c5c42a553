"""Causal attention at DeepSeek's widths, with one document a row and with several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from deepwright_kernels import backend_for

from .case import FLOPS, Case, Settings, applied, compiled, implementations, with_gradients

# (rows, positions, heads, documents a row)
ON_GPU = [(4, 4096, 16, 1), (4, 4096, 16, 8), (4, 4096, 128, 1), (4, 4096, 128, 8), (1, 32768, 16, 1)]
ON_CPU = [(4, 256, 4, 1), (4, 256, 4, 4)]
# What a dense softmax takes beyond this many scores fits no GPU.
DENSE_SCORES = 2**31
BACKWARD = 2.5  # five products where the forward has two


def document_lengths(rows: int, positions: int, documents: int) -> list[list[int]]:
    """Documents of random lengths, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    lengths = []
    for _ in range(rows):
        cuts = torch.randperm(positions - 1, generator=generator)[: documents - 1].sort().values + 1
        edges = torch.cat([torch.zeros(1), cuts, torch.full((1,), positions)])
        lengths.append(edges.diff().int().tolist())
    return lengths


def fused(kind: SDPBackend, pad: bool = False) -> Callable[..., Tensor]:
    """torch's scaled_dot_product_attention by one of its backends; `pad`: values as wide as keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float) -> Tensor:
        width = v.shape[-1]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if pad:
            v = functional.pad(v, (0, q.shape[-1] - width))
        index = torch.arange(q.shape[2], device=q.device)
        mask = None if starts is None else ((index <= index[:, None]) & (index >= starts[:, :, None]))[:, None]
        with sdpa_kernel(kind):
            out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
        return out[..., :width].transpose(1, 2)

    return attend


def flex(starts: Tensor | None, rows: int, positions: int) -> Callable[..., Tensor]:
    """torch's flex_attention, compiled, with a block mask that is made once beforehand."""

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key if starts is None else (query >= key) & (key >= starts[row, query])

    mask = create_block_mask(seen, None if starts is None else rows, None, positions, positions, device="cuda")
    fast = compiled(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float) -> Tensor:
        out: Any = fast(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask, scale=scale)
        return out.transpose(1, 2)

    return attend


def cases(settings: Settings) -> Iterator[Case]:
    key_width, value_width = (192, 128) if settings.gpu else (32, 16)
    for rows, positions, heads, documents in ON_GPU if settings.gpu else ON_CPU:
        lengths = document_lengths(rows, positions, documents)
        starts = None
        if documents > 1:
            firsts = [[sum(row[:n]) for n, length in enumerate(row) for _ in range(length)] for row in lengths]
            starts = torch.tensor(firsts, device=settings.device)
        q, k, v, upstream = (
            torch.randn(rows, positions, heads, width, device=settings.device, dtype=settings.dtype)
            for width in (key_width, key_width, value_width, value_width)
        )
        peers = implementations("packed_attention", settings)
        if rows * heads * positions**2 > DENSE_SCORES:
            peers = {"ours": peers["ours"]}
        if settings.gpu and documents == 1:
            peers["cudnn"] = fused(SDPBackend.CUDNN_ATTENTION)
            peers["flash padded"] = fused(SDPBackend.FLASH_ATTENTION, pad=True)
            peers["efficient"] = fused(SDPBackend.EFFICIENT_ATTENTION)
        elif settings.gpu:
            peers["efficient, mask"] = fused(SDPBackend.EFFICIENT_ATTENTION)
        if settings.gpu and settings.compiled:
            peers["flex"] = flex(starts, rows, positions)
        arguments = (q, k, v, starts, key_width**-0.5)
        backend = backend_for("packed_attention", *arguments)
        amount = float(heads * (key_width + value_width) * sum(n * n for row in lengths for n in row))
        shape = f"{rows} x {positions}, {heads} heads" + (f", {documents} documents a row" if documents > 1 else "")
        yield Case("packed_attention", shape, applied(peers, *arguments), amount, FLOPS, backend)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        runs = with_gradients(peers, leaves, upstream, *arguments)
        amount *= 1 + BACKWARD
        yield Case("packed_attention + gradients", shape, runs, amount, FLOPS, backend)
