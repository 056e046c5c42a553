"""Which number format products run in: parameters stay float32, matrix products follow autocast.

`fp8` is bf16 with some products in FP8 while a stage trains by supervision: `fp8.py` says which.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Self

import torch
from torch import Tensor, nn

Precision = Literal["auto", "fp32", "bf16", "fp8"]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 by itself, not by detours through float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def resolve(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of autocast. `auto` is bf16 on a GPU that has it, else float32.

    On a CPU bf16 has to be asked for: for models of a million parameters the casts take back most of what the products
    save, and samples and training no longer agree to the bit.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16(device) else torch.float32
    return torch.float32 if precision == "fp32" else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Context in which matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class WideBuffers(nn.Module):
    """A module whose own buffers keep their precision when a whole model is cast to a narrower one.

    `model.to(torch.bfloat16)` means the weights. Tables of cos and sin would keep 8 bits of 24, and a balancing bias
    would no longer see the steps of 0.001 that it is corrected by.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(after.device)
        return self
