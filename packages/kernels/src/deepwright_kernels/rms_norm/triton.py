"""Root-mean-square norm, alone or after a residual addition, as Triton kernels: one pass forward, one pass backward.

A program owns a tile of whole rows, several where they are short, so that there is always enough to load at once.
Forward, 1/rms of each row is kept for the backward pass. Backward, a fixed number of programs walk over the rows, and
each sums the weight's gradient of its rows; a long row is worked on while the next one comes into registers. The
partial sums are added up at the end, in the same order every time, so the result does not change from run to run. A row
has to fit into one program.

Shapes: T rows, D columns, G programs of the backward pass.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_ROW = 65536
WIDE_ROW, WIDE_TILE, TILE = 8192, 16384, 4096  # values of a forward program's tile, from this width on and below it
SHORT_ROW = 1024  # shorter ones go through the backward pass several at a time
PROGRAMS_ON_CPU = 4  # of the backward pass: the interpreter runs them one after another
TOTAL_ROWS, TOTAL_COLUMNS = 256, 8  # a tile of the partial sums, when they are added up


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    summed_ptr,
    scale_ptr,
    x_stride,
    residual_stride,
    rows,
    columns,
    eps,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offset_D = tl.arange(0, BLOCK_D)
    inside_D = offset_D < columns
    inside_TD = (row_T < rows)[:, None] & inside_D[None, :]
    x_TD = tl.load(x_ptr + (row_T * x_stride)[:, None] + offset_D[None, :], mask=inside_TD, other=0.0).to(tl.float32)
    here_TD = (row_T * columns)[:, None] + offset_D[None, :]
    if ADD:
        residual_TD = tl.load(
            residual_ptr + (row_T * residual_stride)[:, None] + offset_D[None, :], mask=inside_TD, other=0.0
        )
        summed_TD = (x_TD + residual_TD.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + here_TD, summed_TD, mask=inside_TD)
        x_TD = summed_TD.to(tl.float32)  # rounded: the backward pass finds no more than this
    # Before the sum, which waits for the whole row: the weight comes meanwhile.
    weight_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0).to(tl.float32)
    scale_T = tl.rsqrt(tl.sum(x_TD * x_TD, axis=1) / columns + eps)
    tl.store(scale_ptr + row_T, scale_T, mask=row_T < rows)
    normed_TD = x_TD * scale_T[:, None] * weight_D[None, :]
    tl.store(normed_ptr + here_TD, normed_TD.to(normed_ptr.dtype.element_ty), mask=inside_TD)


@triton.jit
def _backward_kernel(
    grad_ptr,
    grad_summed_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    x_stride,
    rows,
    columns,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Long rows, one at a time. With n = x · scale, y = n · w: dx = scale · (g·w − n · mean(g·w·n)), dw = Σ g · n."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    offset_D = tl.arange(0, BLOCK_D)
    inside_D = offset_D < columns
    sum_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    first = tl.cast(program, tl.int64)
    next_x_D = tl.load(x_ptr + first * x_stride + offset_D, mask=inside_D, other=0.0)
    next_grad_D = tl.load(grad_ptr + first * columns + offset_D, mask=inside_D, other=0.0)
    next_scale = tl.load(scale_ptr + first)
    for index in tl.range(program, rows, programs, num_stages=1):
        row = tl.cast(index, tl.int64)
        x_D, grad_D, scale = next_x_D, next_grad_D, next_scale
        following = row + programs
        there_D = offset_D < tl.where(following < rows, columns, 0)
        next_x_D = tl.load(x_ptr + following * x_stride + offset_D, mask=there_D, other=0.0)
        next_grad_D = tl.load(grad_ptr + following * columns + offset_D, mask=there_D, other=0.0)
        next_scale = tl.load(scale_ptr + tl.minimum(following, rows - 1))

        wide_D, grad_D = x_D.to(tl.float32), grad_D.to(tl.float32)
        weight_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        pull = tl.sum(grad_D * weight_D * wide_D, axis=0) / columns * scale * scale
        # Loaded twice, and with another policy, or the compiler would keep it in registers that hold the next row.
        again_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0, eviction_policy="evict_last").to(tl.float32)
        grad_x_D = (grad_D * again_D - wide_D * pull) * scale
        here_D = row * columns + offset_D
        if ADD:
            grad_x_D += tl.load(grad_summed_ptr + here_D, mask=inside_D, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + here_D, grad_x_D.to(grad_x_ptr.dtype.element_ty), mask=inside_D)
        sum_D += grad_D * (wide_D * scale)
    tl.store(partial_ptr + program * columns + offset_D, sum_D, mask=inside_D)


@triton.jit
def _backward_short_kernel(
    grad_ptr,
    grad_summed_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    x_stride,
    rows,
    columns,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same for short rows, several at a time."""
    row_T, offset_D = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside_D = offset_D < columns
    x_TD = row_T[:, None] * x_stride + offset_D[None, :]
    y_TD = row_T[:, None] * columns + offset_D[None, :]
    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_T, rows, tl.num_programs(0) * BLOCK_T):
        first = tl.cast(start, tl.int64)
        in_T = row_T < rows - start
        inside_TD = in_T[:, None] & inside_D[None, :]
        wide_TD = tl.load(x_ptr + first * x_stride + x_TD, mask=inside_TD, other=0.0).to(tl.float32)
        grad_TD = tl.load(grad_ptr + first * columns + y_TD, mask=inside_TD, other=0.0).to(tl.float32)
        scale_T = tl.load(scale_ptr + first + row_T, mask=in_T, other=0.0)
        weight_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        pull_T = tl.sum(grad_TD * weight_D[None, :] * wide_TD, axis=1) / columns * scale_T * scale_T
        again_D = tl.load(weight_ptr + offset_D, mask=inside_D, other=0.0, eviction_policy="evict_last").to(tl.float32)
        grad_x_TD = (grad_TD * again_D[None, :] - wide_TD * pull_T[:, None]) * scale_T[:, None]
        if ADD:
            grad_x_TD += tl.load(grad_summed_ptr + first * columns + y_TD, mask=inside_TD, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + first * columns + y_TD, grad_x_TD.to(grad_x_ptr.dtype.element_ty), mask=inside_TD)
        sum_TD += grad_TD * (wide_TD * scale_T[:, None])
    tl.store(partial_ptr + tl.program_id(0) * columns + offset_D, tl.sum(sum_TD, axis=0), mask=inside_D)


@triton.jit
def _total_kernel(partial_ptr, total_ptr, programs, columns, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    offset_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_GD = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    for start in range(0, programs, BLOCK_G):
        program_G = start + tl.arange(0, BLOCK_G)
        inside_GD = (program_G < programs)[:, None] & (offset_D < columns)[None, :]
        sum_GD += tl.load(partial_ptr + program_G[:, None] * columns + offset_D[None, :], mask=inside_GD, other=0.0)
    total_D = tl.sum(sum_GD, axis=0).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + offset_D, total_D, mask=offset_D < columns)


def _rows(x: Tensor) -> Tensor:
    """x as rows whose columns lie side by side; a copy only when it has to be one."""
    x_TD = x.reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power_of_two(size: int) -> int:
    """The first not below; triton's own functions for this and for rounding up take a host 2 µs each."""
    return 1 << (size - 1).bit_length()


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, x + residual (empty without one), 1/rms of each row)."""
    x_TD = _rows(x)
    residual_TD = x_TD if residual is None else _rows(residual)
    rows, columns = x_TD.shape
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed = torch.empty(x.shape if residual is not None else 0, dtype=dtype, device=x.device)
    scale_T = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = _power_of_two(columns)
        # Two rows of 7168 are 16 K values, which keep a processor's loads in flight; shorter rows share it with others.
        block_rows = max(1, (WIDE_TILE if block >= WIDE_ROW else TILE) // block)
        _forward_kernel[(-(-rows // block_rows),)](
            x_TD,
            residual_TD,
            weight.contiguous(),
            normed,
            summed,
            scale_T,
            x_TD.stride(0),
            residual_TD.stride(0),
            rows,
            columns,
            eps,
            ADD=residual is not None,
            BLOCK_T=block_rows,
            BLOCK_D=block,
            num_warps=min(16, max(1, block_rows * block // 512)),
        )
    return normed, summed, scale_T


def _launch_backward(
    grad: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (with that of the sum added, if there is one) and of the weight."""
    x_TD, grad_TD = _rows(x), grad.reshape(-1, x.shape[-1]).contiguous()
    rows, columns = x_TD.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows:
        return grad_x, torch.zeros_like(weight)
    add, block = grad_summed is not None, _power_of_two(columns)
    if block < SHORT_ROW:
        block_rows, warps, per_processor = max(2, 1024 // block), 2, 12
        registers = {"maxnreg": 80} if x.is_cuda else {}  # so that all twelve fit
    else:
        # The third load of an addition pays for more threads with fewer values each. Measured at 2048 and 7168.
        block_rows, warps = 1, min(32, block // (256 if add else 512))
        per_processor, registers = max(1, (32 if add else 20) // warps), {}
    most = PROGRAMS_ON_CPU
    if x.is_cuda:
        most = per_processor * _processors(x.device.index or 0)
    programs = min(-(-rows // block_rows), most)
    partial_GD = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    arguments = (
        grad_TD,
        grad_TD if grad_summed is None else grad_summed.contiguous(),
        x_TD,
        weight.contiguous(),
        scale_T,
        grad_x,
        partial_GD,
        x_TD.stride(0),
        rows,
        columns,
        add,
    )
    if block < SHORT_ROW:
        _backward_short_kernel[(programs,)](*arguments, block_rows, block, num_warps=warps, **registers)
    else:
        _backward_kernel[(programs,)](*arguments, block, num_warps=warps)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _total_kernel[(-(-columns // TOTAL_COLUMNS),)](
        partial_GD, grad_weight, programs, columns, BLOCK_G=TOTAL_ROWS, BLOCK_D=TOTAL_COLUMNS, num_warps=4
    )
    return grad_x, grad_weight


@torch.library.custom_op("deepwright::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, scale_T = _launch_forward(x, None, weight, eps, x.dtype)
    return normed, scale_T


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("deepwright::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad, None, x, weight, scale_T)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    x, weight, _eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # nobody asks for the gradient of 1/rms: no zeros for it


def _gradients(ctx, grad, _grad_scale):
    return (None, None, None) if grad is None else (*_backward(grad, *ctx.saved_tensors), None)


_forward.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("deepwright::add_rms_norm", mutates_args=())
def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, residual, weight, eps, residual.dtype)


@_add_forward.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    normed, summed = (torch.empty(x.shape, dtype=residual.dtype, device=x.device) for _ in range(2))
    return normed, summed, x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("deepwright::add_rms_norm_backward", mutates_args=())
def _add_backward(
    grad: Tensor, grad_summed: Tensor | None, summed: Tensor, weight: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad, grad_summed, summed, weight, scale_T)


@_add_backward.register_fake
def _(
    grad: Tensor, grad_summed: Tensor | None, summed: Tensor, weight: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty(summed.shape, dtype=summed.dtype, device=summed.device), torch.empty_like(weight)


def _add_keep(ctx, inputs, output) -> None:
    x, _residual, weight, _eps = inputs
    _normed, summed, scale_T = output
    ctx.save_for_backward(summed, weight, scale_T)
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)


def _add_gradients(ctx, grad, grad_summed, _grad_scale):
    grad_weight = None
    if grad is not None:
        grad_summed, grad_weight = _add_backward(grad, grad_summed, *ctx.saved_tensors)
    grad_x = None if grad_summed is None else grad_summed.to(ctx.x_dtype)
    return grad_x, grad_summed, grad_weight, None


_add_forward.register_autograd(_add_gradients, setup_context=_add_keep)


class _Norm(torch.autograd.Function):
    """The same without the operator around it, whose dispatch takes a host longer than the kernel does a GPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        normed, _, scale_T = _launch_forward(x, None, weight, eps, x.dtype)
        ctx.save_for_backward(x, weight, scale_T)
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (*_launch_backward(grad, None, *ctx.saved_tensors), None)


class _AddNorm(torch.autograd.Function):
    """As `_Norm`, after an addition."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        normed, summed, scale_T = _launch_forward(x, residual, weight, eps, residual.dtype)
        ctx.save_for_backward(summed, weight, scale_T)
        ctx.x_dtype = x.dtype
        ctx.set_materialize_grads(False)
        return normed, summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_summed):
        grad_weight = None
        if grad is not None:
            grad_summed, grad_weight = _launch_backward(grad, grad_summed, *ctx.saved_tensors)
        return None if grad_summed is None else grad_summed.to(ctx.x_dtype), grad_summed, grad_weight, None


def _require_narrow(operator: str, x: Tensor) -> None:
    if x.shape[-1] > LARGEST_ROW:
        raise ValueError(f"{operator}: x has {x.shape[-1]} columns; the triton backend takes at most {LARGEST_ROW}.")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's dtype."""
    _require_narrow("rms_norm", x)
    if torch.compiler.is_compiling():
        return _forward(x, weight, eps)[0]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Norm.apply(x, weight, eps)
    return _launch_forward(x, None, weight, eps, x.dtype)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both in the residual's dtype."""
    _require_narrow("add_rms_norm", x)
    if torch.compiler.is_compiling():
        return _add_forward(x, residual, weight, eps)[:2]
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return _AddNorm.apply(x, residual, weight, eps)
    return _launch_forward(x, residual, weight, eps, residual.dtype)[:2]
