"""What this machine can do: the device, its threads, and the matrix rate that utilisation is measured against."""

from __future__ import annotations

import time
from functools import cache

import torch


def pick_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of a few: measured, because data sheets speak of other conditions.

    The side is 1024 on a CPU (0.2 s in all on two cores) and 8192 on a GPU.
    """
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    del product
    return 2.0 * side**3 / best
