"""What a step has for the host travels together: one copy, one wait."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Parcel:
    """Tensors on their way to the host."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, tensor: Tensor) -> int:
        """Put a tensor in; returns where `open` has it."""
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def open(self) -> list[np.ndarray]:
        """What was put in, as int64 or float64."""
        wide = [tensor.double() if tensor.is_floating_point() else tensor.long() for tensor in self._tensors]
        # The bits of the float64 travel as int64.
        flat = torch.cat([tensor.contiguous().view(torch.int64).flatten() for tensor in wide]).cpu().numpy()
        arrays, start = [], 0
        for tensor in wide:
            part = flat[start : start + tensor.numel()].reshape(tensor.shape)
            arrays.append(part.view(np.float64) if tensor.is_floating_point() else part)
            start += tensor.numel()
        return arrays
