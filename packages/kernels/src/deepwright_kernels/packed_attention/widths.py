"""Which tensors each backend of attention takes."""

from __future__ import annotations

import torch

WIDEST_TRITON = 256
HOPPER_KEYS, HOPPER_VALUES = (64, 128, 192), (64, 128)


def why_not_triton(*widths: int) -> str | None:
    """None where its tiles take these widths."""
    widest = max(widths)
    return None if widest <= WIDEST_TRITON else f"a width is {widest} and its tiles take at most {WIDEST_TRITON}"


def why_not_hopper(dtype: torch.dtype, key_width: int, value_width: int) -> str | None:
    """None where the CUDA kernels take this dtype and these widths."""
    if dtype != torch.bfloat16:
        return f"the tensors are {str(dtype).removeprefix('torch.')} and its products are made in bfloat16"
    if key_width not in HOPPER_KEYS or value_width not in HOPPER_VALUES or value_width > key_width:
        return (
            f"the widths are {key_width} and {value_width}; it takes keys of 64, 128 or 192 and values of 64 or 128, "
            "no wider than keys"
        )
    return None
