"""Root-mean-square norm as Triton kernels: one pass forward, one pass backward.

Forward, a program owns a row and keeps 1/rms of it for the backward pass. Backward, a fixed number of programs walk
over the rows and each sums the weight's gradient of its rows; the partial sums are added up at the end, in the same
order every time, so the result does not change from run to run. A row has to fit into one program.

Shapes: T rows, D columns, G programs of the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_ROW = 65536
BACKWARD_PROGRAMS_PER_PROCESSOR = 4
BACKWARD_PROGRAMS_ON_CPU = 4  # the interpreter runs them one after another


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, y_ptr, scale_ptr, x_stride, columns, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offset_D = tl.arange(0, BLOCK_D)
    inside_D = offset_D < columns
    x_D = tl.load(x_ptr + row * x_stride + offset_D, mask=inside_D, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_D * x_D, axis=0) / columns + eps)
    tl.store(scale_ptr + row, scale)
    y_D = x_D * scale * weight_D
    tl.store(y_ptr + row * columns + offset_D, y_D.to(y_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, grad_weight_ptr, x_stride, rows, columns, BLOCK_D: tl.constexpr
):
    # With n = x · scale and y = n · w: dx = scale · (g·w − n · mean(g·w·n)), dw = Σ_rows g · n.
    program = tl.program_id(0)
    offset_D = tl.arange(0, BLOCK_D)
    inside_D = offset_D < columns
    weight_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0).to(tl.float32)
    grad_weight_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for row_index in range(program, rows, tl.num_programs(0)):
        row = tl.cast(row_index, tl.int64)
        x_D = tl.load(x_ptr + row * x_stride + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        grad_D = tl.load(grad_ptr + row * columns + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed_D = x_D * scale
        grad_normed_D = grad_D * weight_D
        mean = tl.sum(grad_normed_D * normed_D, axis=0) / columns
        grad_x_D = (grad_normed_D - normed_D * mean) * scale
        tl.store(grad_x_ptr + row * columns + offset_D, grad_x_D.to(grad_x_ptr.dtype.element_ty), mask=inside_D)
        grad_weight_D += grad_D * normed_D
    tl.store(grad_weight_ptr + program * columns + offset_D, grad_weight_D, mask=inside_D)


def _rows(x: Tensor) -> Tensor:
    """x as rows whose columns lie side by side; a copy only when it has to be one."""
    x_TD = x.reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))


@torch.library.custom_op("deepwright::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_TD = _rows(x)
    rows, columns = x_TD.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale_T = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(columns)
        _forward_kernel[(rows,)](
            x_TD, weight.contiguous(), y, scale_T, x_TD.stride(0), columns, eps, BLOCK_D=block, num_warps=_warps(block)
        )
    return y, scale_T


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("deepwright::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    x_TD, grad_TD = _rows(x), grad.reshape(-1, x.shape[-1]).contiguous()
    rows, columns = x_TD.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows:
        return grad_x, torch.zeros_like(weight)
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        programs = min(rows, BACKWARD_PROGRAMS_PER_PROCESSOR * processors)
    else:
        programs = min(rows, BACKWARD_PROGRAMS_ON_CPU)
    partial_GD = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _backward_kernel[(programs,)](
        grad_TD,
        x_TD,
        weight.contiguous(),
        scale_T,
        grad_x,
        partial_GD,
        x_TD.stride(0),
        rows,
        columns,
        BLOCK_D=block,
        num_warps=_warps(block),
    )
    return grad_x, partial_GD.sum(0).to(weight.dtype)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    x, weight, _eps = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx, grad, _grad_scale):
    return (*_backward(grad, *ctx.saved_tensors), None)


_forward.register_autograd(_gradients, setup_context=_keep)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    if x.shape[-1] > LARGEST_ROW:
        raise ValueError(f"rms_norm: x has {x.shape[-1]} columns; the triton backend takes at most {LARGEST_ROW}.")
    return _forward(x, weight, eps)[0]
