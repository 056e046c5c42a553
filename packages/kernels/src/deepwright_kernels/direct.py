"""Whether an operator may call its implementation at once, past torch's registry of operators.

A `torch.library` operator is what torch.compile, fake tensors and autograd need. Where none of them is at work, it only
costs the host about 20 µs a call, as much as a kernel of a decoding step takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def direct(*tensors: Tensor | None) -> bool:
    """True where nothing is traced, no tensor is of a special kind and none is to get a gradient."""
    if torch.compiler.is_compiling():
        return False
    gradients = torch.is_grad_enabled()
    return all(
        tensor is None or (type(tensor) in PLAIN and not (gradients and tensor.requires_grad)) for tensor in tensors
    )
