"""Root-mean-square norm, alone or after a residual addition, as Triton kernels: one pass forward, one pass backward.

A program owns a tile of whole rows: one of a wide model, several of a narrow latent, so that there is always enough to
load at once. Forward, 1/rms of each row is kept for the backward pass. Backward, a fixed number of programs walk over
the rows, loading the next while they work on the last, and each sums the weight's gradient of its rows; the partial
sums are added up at the end, in the same order every time, so the result does not change from run to run. A row has to
fit into one program.

Shapes: T rows, D columns, G programs of the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_ROW = 65536
TILE = 4096  # values of a tile, where rows are shorter than that
BACKWARD_PROGRAMS_PER_PROCESSOR = 4
BACKWARD_PROGRAMS_ON_CPU = 4  # the interpreter runs them one after another
TOTAL_ROWS, TOTAL_COLUMNS = 64, 32  # a tile of the partial sums, when they are added up


@triton.jit
def _load(ptr, start_T, inside_T, columns, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Columns FIRST .. FIRST + BLOCK of some rows, zeros beyond the edges."""
    column_D = FIRST + tl.arange(0, BLOCK)
    inside_TD = (column_D < columns)[None, :]
    if start_T.shape[0] > 1:
        inside_TD = inside_TD & inside_T[:, None]
    return tl.load(ptr + start_T[:, None] + column_D[None, :], mask=inside_TD, other=0.0)


@triton.jit
def _store(ptr, values_TD, start_T, inside_T, columns, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    column_D = FIRST + tl.arange(0, BLOCK)
    inside_TD = (column_D < columns)[None, :]
    if start_T.shape[0] > 1:
        inside_TD = inside_TD & inside_T[:, None]
    tl.store(ptr + start_T[:, None] + column_D[None, :], values_TD.to(ptr.dtype.element_ty), mask=inside_TD)


@triton.jit
def _load_weight(weight_ptr, columns, FIRST: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr = False):
    # Another policy makes it another load: else the compiler would keep the first one's values in registers.
    column_D = FIRST + tl.arange(0, BLOCK)
    weight_D = tl.load(
        weight_ptr + column_D, mask=column_D < columns, other=0.0, eviction_policy="evict_last" if AGAIN else ""
    )
    return weight_D.to(tl.float32)[None, :]


@triton.jit
def _summed(
    x_ptr, residual_ptr, summed_ptr, x_T, residual_T, y_T, inside_T, columns,
    ADD: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, or x + residual, which is stored and rounded: the backward pass and the next layers find no more than this."""
    x_TD = _load(x_ptr, x_T, inside_T, columns, FIRST, BLOCK)
    if ADD:
        residual_TD = _load(residual_ptr, residual_T, inside_T, columns, FIRST, BLOCK)
        x_TD = (x_TD.to(tl.float32) + residual_TD.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        _store(summed_ptr, x_TD, y_T, inside_T, columns, FIRST, BLOCK)
    return x_TD


@triton.jit
def _squares(x_TD):
    wide_TD = x_TD.to(tl.float32)
    return tl.sum(wide_TD * wide_TD, axis=1)


@triton.jit
def _store_normed(
    normed_ptr, x_TD, scale_T, weight_ptr, y_T, inside_T, columns, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    normed_TD = x_TD.to(tl.float32) * scale_T[:, None] * _load_weight(weight_ptr, columns, FIRST, BLOCK)
    _store(normed_ptr, normed_TD, y_T, inside_T, columns, FIRST, BLOCK)


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
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    x_ptr += first * x_stride
    residual_ptr += first * residual_stride
    normed_ptr += first * columns
    summed_ptr += first * columns
    row_T = tl.arange(0, BLOCK_T)
    in_T = row_T < rows - first
    x_T, residual_T, y_T = row_T * x_stride, row_T * residual_stride, row_T * columns
    a_TD = _summed(x_ptr, residual_ptr, summed_ptr, x_T, residual_T, y_T, in_T, columns, ADD, 0, A)
    squares_T = _squares(a_TD)
    if B:
        b_TD = _summed(x_ptr, residual_ptr, summed_ptr, x_T, residual_T, y_T, in_T, columns, ADD, A, B)
        squares_T += _squares(b_TD)
    if C:
        c_TD = _summed(x_ptr, residual_ptr, summed_ptr, x_T, residual_T, y_T, in_T, columns, ADD, A + B, C)
        squares_T += _squares(c_TD)
    scale_T = tl.rsqrt(squares_T / columns + eps)
    tl.store(scale_ptr + first + row_T, scale_T, mask=in_T)
    _store_normed(normed_ptr, a_TD, scale_T, weight_ptr, y_T, in_T, columns, 0, A)
    if B:
        _store_normed(normed_ptr, b_TD, scale_T, weight_ptr, y_T, in_T, columns, A, B)
    if C:
        _store_normed(normed_ptr, c_TD, scale_T, weight_ptr, y_T, in_T, columns, A + B, C)


@triton.jit
def _product_sum(x_TD, grad_TD, weight_ptr, columns, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    weight_1D = _load_weight(weight_ptr, columns, FIRST, BLOCK)
    return tl.sum(grad_TD.to(tl.float32) * weight_1D * x_TD.to(tl.float32), axis=1)


@triton.jit
def _backward_part(
    x_TD, grad_TD, sum_TD, scale_T, pull_T, weight_ptr, grad_summed_ptr, grad_x_ptr, y_T, inside_T, columns,
    ADD: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores these columns' gradient of x and gives the sum of the weight's so far."""
    wide_TD, grad_TD = x_TD.to(tl.float32), grad_TD.to(tl.float32)
    weight_1D = _load_weight(weight_ptr, columns, FIRST, BLOCK, True)
    grad_x_TD = (grad_TD * weight_1D - wide_TD * pull_T[:, None]) * scale_T[:, None]
    if ADD:
        grad_x_TD += _load(grad_summed_ptr, y_T, inside_T, columns, FIRST, BLOCK).to(tl.float32)
    _store(grad_x_ptr, grad_x_TD, y_T, inside_T, columns, FIRST, BLOCK)
    return sum_TD + grad_TD * (wide_TD * scale_T[:, None])


@triton.jit
def _store_partial(partial_ptr, sum_TD, columns, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    column_D = FIRST + tl.arange(0, BLOCK)
    tl.store(partial_ptr + tl.program_id(0) * columns + column_D, tl.sum(sum_TD, axis=0), mask=column_D < columns)


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
    BLOCK_T: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    # With n = x · scale and y = n · w: dx = scale · (g·w − n · mean(g·w·n)), dw = Σ_rows g · n. The weight is loaded
    # again where it is needed: the L1 has it, and the registers are worth another program on the processor.
    a_sum_TD = tl.zeros((BLOCK_T, A), dtype=tl.float32)
    b_sum_TD = tl.zeros((BLOCK_T, B if B else 1), dtype=tl.float32)
    c_sum_TD = tl.zeros((BLOCK_T, C if C else 1), dtype=tl.float32)
    row_T = tl.arange(0, BLOCK_T)
    x_T, y_T = row_T * x_stride, row_T * columns
    for start in range(tl.program_id(0) * BLOCK_T, rows, tl.num_programs(0) * BLOCK_T):
        first = tl.cast(start, tl.int64)
        in_T = row_T < rows - start
        x_here, grad_here, grad_x_here = (
            x_ptr + first * x_stride,
            grad_ptr + first * columns,
            grad_x_ptr + first * columns,
        )
        summed_here = grad_summed_ptr + first * columns
        a_x_TD, a_grad_TD = _load(x_here, x_T, in_T, columns, 0, A), _load(grad_here, y_T, in_T, columns, 0, A)
        if B:
            b_x_TD, b_grad_TD = _load(x_here, x_T, in_T, columns, A, B), _load(grad_here, y_T, in_T, columns, A, B)
        if C:
            c_x_TD = _load(x_here, x_T, in_T, columns, A + B, C)
            c_grad_TD = _load(grad_here, y_T, in_T, columns, A + B, C)
        scale_T = tl.load(scale_ptr + first + row_T, mask=in_T, other=0.0)
        sum_T = _product_sum(a_x_TD, a_grad_TD, weight_ptr, columns, 0, A)
        if B:
            sum_T += _product_sum(b_x_TD, b_grad_TD, weight_ptr, columns, A, B)
        if C:
            sum_T += _product_sum(c_x_TD, c_grad_TD, weight_ptr, columns, A + B, C)
        pull_T = sum_T / columns * scale_T * scale_T
        a_sum_TD = _backward_part(
            a_x_TD, a_grad_TD, a_sum_TD, scale_T, pull_T, weight_ptr, summed_here, grad_x_here, y_T, in_T, columns,
            ADD, 0, A,
        )  # fmt: skip
        if B:
            b_sum_TD = _backward_part(
                b_x_TD, b_grad_TD, b_sum_TD, scale_T, pull_T, weight_ptr, summed_here, grad_x_here, y_T, in_T, columns,
                ADD, A, B,
            )  # fmt: skip
        if C:
            c_sum_TD = _backward_part(
                c_x_TD, c_grad_TD, c_sum_TD, scale_T, pull_T, weight_ptr, summed_here, grad_x_here, y_T, in_T, columns,
                ADD, A + B, C,
            )  # fmt: skip
    _store_partial(partial_ptr, a_sum_TD, columns, 0, A)
    if B:
        _store_partial(partial_ptr, b_sum_TD, columns, A, B)
    if C:
        _store_partial(partial_ptr, c_sum_TD, columns, A + B, C)


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


def _parts(columns: int) -> tuple[int, int, int]:
    """Up to three powers of two that cover the columns: 7168 = 4096 + 2048 + 1024, where one would be 8192."""
    first = 1 << (columns.bit_length() - 1)
    left = columns - first
    second = 1 << (left.bit_length() - 1) if left else 0
    left -= second
    return first, second, triton.next_power_of_2(left) if left else 0


def _tile(columns: int) -> tuple[int, tuple[int, int, int], int]:
    """Rows of a tile, the parts of its columns, and its warps."""
    parts = _parts(columns)
    rows = max(1, TILE // triton.next_power_of_2(columns))
    return rows, parts, min(16, max(1, rows * parts[0] // 512))


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
        block_rows, parts, warps = _tile(columns)
        _forward_kernel[(triton.cdiv(rows, block_rows),)](
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
            residual is not None,
            block_rows,
            *parts,
            num_warps=warps,
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
    block_rows, parts, warps = _tile(columns)
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        most = BACKWARD_PROGRAMS_PER_PROCESSOR * processors
    else:
        most = BACKWARD_PROGRAMS_ON_CPU
    programs = min(triton.cdiv(rows, block_rows), most)
    partial_GD = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
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
        grad_summed is not None,
        block_rows,
        *parts,
        num_warps=warps,
    )
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _total_kernel[(triton.cdiv(columns, TOTAL_COLUMNS),)](
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
