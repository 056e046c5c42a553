"""What every file of cases uses: the device, drawing tensors, and the two sides that have to agree."""

import os

import torch
from torch import Tensor

from deepwright_kernels import dispatch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
    torch.float16: {"rtol": 0.005, "atol": 0.005},
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def both(name: str, arguments: tuple, leaves: tuple[Tensor, ...], upstream: Tensor) -> list[tuple[Tensor, ...]]:
    """(output, gradients) of the reference and of the kernel."""
    results = []
    for backend in ("reference", "triton"):
        output = dispatch.load(name, backend)(*arguments)
        results.append((output, *torch.autograd.grad(output, leaves, upstream)))
    return results
