"""SwiGLU's backward pass in FP8 by the CUDA kernel that quantises tiles in both directions (`fp8_rows/tile.cu`).

Shapes: T tokens, I hidden size, J = 2 I gates and ups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda_source import kernel
from ..fp8_layout import BLOCK, blocks, empty_rows
from ..fp8_rows.hopper import SOURCE, THREADS, aligned

BLOCKS = 2  # on a multiprocessor
# Three tiles of bf16 fetched ahead, one transposed in FP8, and a scale for each of its columns.
SHARED_BYTES = 3 * BLOCK * BLOCK * 2 + BLOCK * BLOCK + 4 * BLOCK


def _empty(gate_up_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, both), device = gate_up_TJ.shape, gate_up_TJ.device
    rows, columns = empty_rows(tokens, both, device), empty_rows(both, tokens, device)
    return *rows, *columns, *empty_rows(both // 2, tokens, device)


def _launch_backward(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty(gate_up_TJ)
    if not gate_up_TJ.numel():
        return outputs
    grad_TI, gate_up_TJ = aligned(grad_TI), aligned(gate_up_TJ)
    rows, row_scales, columns, column_scales, _, hidden_scales = outputs
    tokens, hidden = grad_TI.shape
    defines = {"SWIGLU": 1, "ROWS": 1, "POWER_OF_TWO": int(power_of_two_scales), "BLOCKS": BLOCKS}
    processors = torch.cuda.get_device_properties(grad_TI.device).multi_processor_count
    kernel(SOURCE, "fp8_tile", defines, SHARED_BYTES, grad_TI.device).launch(
        (min(blocks(tokens) * (hidden // BLOCK), BLOCKS * processors), 1, 1),
        (THREADS, 1, 1),
        grad_TI,
        gate_up_TJ,
        *outputs,
        tokens,
        hidden,
        grad_TI.stride(0),
        gate_up_TJ.stride(0),
        rows.stride(0),
        row_scales.stride(1),
        columns.stride(0),
        column_scales.stride(1),
        hidden_scales.stride(1),
    )
    return outputs


_backward = torch.library.custom_op(
    "deepwright::swiglu_backward_quantise_fp8_hopper", _launch_backward, mutates_args=()
)


@_backward.register_fake
def _(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(gate_up_TJ)


def swiglu_backward_quantise_fp8(
    grad_TI: Tensor, gate_up_TJ: Tensor, power_of_two_scales: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of gate and up along rows and along columns, and the hidden values along columns."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    backward = _backward if torch.compiler.is_compiling() else _launch_backward
    return backward(grad_TI, gate_up_TJ, power_of_two_scales)
