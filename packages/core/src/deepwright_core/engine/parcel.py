"""Between host and device without either waiting for the other: what goes to the device takes pinned memory, and what
a step has for the host travels together, in one copy with one wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(values: Any, device: torch.device, dtype: type = np.int64) -> Tensor:
    """Values of the host as a tensor of the device, whose work so far the host does not wait for."""
    on_host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


class Parcel:
    """Tensors on their way to the host."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._wide: list[Tensor] = []
        self._flat = torch.empty(0, dtype=torch.int64)
        self._arrival: torch.cuda.Event | None = None

    def add(self, tensor: Tensor) -> int:
        """Put a tensor in; returns where `open` has it."""
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def send(self) -> None:
        """Start the copy, once. What is asked of the device from now on does not delay it."""
        if self._wide:
            return
        self._wide = [tensor.double() if tensor.is_floating_point() else tensor.long() for tensor in self._tensors]
        # The bits of the float64 travel as int64.
        flat = torch.cat([tensor.contiguous().view(torch.int64).flatten() for tensor in self._wide])
        self._flat = flat
        if flat.is_cuda:
            self._flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._flat.copy_(flat, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def open(self) -> list[np.ndarray]:
        """Wait for what was put in: int64 or float64."""
        if self._arrival is not None:
            self._arrival.synchronize()
        flat = self._flat.numpy()
        arrays, start = [], 0
        for tensor in self._wide:
            part = flat[start : start + tensor.numel()].reshape(tensor.shape)
            arrays.append(part.view(np.float64) if tensor.is_floating_point() else part)
            start += tensor.numel()
        return arrays
