"""Chunked prefill: new tokens over a context whose keys and values are already expanded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepwright_kernels import backend_for, context_attention, dispatch

from .case import FLOPS, Case, Run, Settings

# (sequences, new tokens, context, heads)
ON_GPU = [(1, 8192, 8192, 16), (1, 4096, 32768, 16), (1, 2048, 16384, 128), (8, 512, 8192, 16)]
ON_CPU = [(4, 64, 256, 4)]


def cases(settings: Settings) -> Iterator[Case]:
    key_width, value_width = (192, 128) if settings.gpu else (32, 16)
    for batch, new, context, heads in ON_GPU if settings.gpu else ON_CPU:
        q, k, v = (
            torch.randn(batch, size, heads, width, device=settings.device, dtype=settings.dtype)
            for size, width in ((new, key_width), (context, key_width), (context, value_width))
        )

        def expand(begin: int, end: int, k: Tensor = k, v: Tensor = v) -> tuple[Tensor, Tensor]:
            return k[:, begin:end], v[:, begin:end]

        lengths = torch.full((batch,), context, device=settings.device)
        positions = lengths[:, None] - new + torch.arange(new, device=settings.device)
        arguments = (q, expand, context, positions, lengths, key_width**-0.5)

        def run(function: Callable[..., Tensor], arguments: tuple = (*arguments, None)) -> Run:
            return lambda: function(*arguments)

        runs = {"ours": run(context_attention), "sdpa, mask": run(dispatch.load("context_attention", "torch"))}
        if batch * heads * new * context <= 2**31:
            runs["eager"] = run(dispatch.load("context_attention", "reference"))
        pairs = batch * (new * (context - new) + new * (new + 1) / 2)
        amount = 2.0 * heads * (key_width + value_width) * pairs
        shape = f"{batch} x {new} new of {context}, {heads} heads"
        yield Case("context_attention", shape, runs, amount, FLOPS, backend_for("context_attention", *arguments))
