"""A linear layer for each group of rows as a persistent Triton kernel, forward and for the gradient of the rows.

A fixed number of programs share the tiles of all groups. Which tiles there are is found on the device from the ends of
the groups: a prefix sum over tiles per group says which group a tile belongs to, so the host never reads an end. A tile
belongs to one group only; its rows beyond the group's end are computed and not stored.

Operands come through TMA descriptors, which clear what lies outside a tensor. The gradient of the weights is torch's
grouped product: groups that end anywhere cut the summed dimension there, and a Triton kernel that masks the last block
of it was slower.

Shapes: T rows in group order, E groups, K inputs, N outputs; tiles of M rows, J outputs, R of the summed dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operation import Operation

BAND = 8
PROGRAMS_ON_CPU = 3  # the interpreter runs them one after another
# Flattened, the loop over tiles and the one over the summed dimension are pipelined as one: the next tile is being read
# while a tile is written. Where sums are long there is little to hide, and the plain loops keep more registers.
TILE = {"BLOCK_M": 128, "BLOCK_J": 256, "BLOCK_R": 64, "num_warps": 8, "num_stages": 4, "FLATTEN": True}
LONG_SUM = 4096
LONG_SUM_TILE = {**TILE, "num_stages": 3, "FLATTEN": False}
# With few rows for each group the time goes to reading weights.
FEW_ROWS = 64
FEW_ROWS_TILE = {"BLOCK_M": 64, "BLOCK_J": 128, "BLOCK_R": 128, "num_warps": 4, "num_stages": 4, "FLATTEN": True}
TILE_ON_CPU = {"BLOCK_M": 16, "BLOCK_J": 32, "BLOCK_R": 16, "FLATTEN": False}


@triton.jit
def group_tiles(ends_ptr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Tiles of rows of each group, and the running sum."""
    group_E = tl.arange(0, BLOCK_E)
    end_E = tl.load(ends_ptr + group_E, mask=group_E < GROUPS, other=0)
    start_E = tl.load(ends_ptr + group_E - 1, mask=(group_E > 0) & (group_E < GROUPS), other=0)
    tiles_E = (end_E - start_E + BLOCK_M - 1) // BLOCK_M
    return tiles_E, tl.cumsum(tiles_E, axis=0)


@triton.jit
def place_of(tile, tiles_E, tile_ends_E, columns, BAND: tl.constexpr, BLOCK_E: tl.constexpr):
    """(group, tile of its rows, tile of columns): tiles of a group follow each other, in bands of rows for the L2."""
    group = tl.sum((tile_ends_E * columns <= tile).to(tl.int32), axis=0)
    mine_E = tl.arange(0, BLOCK_E) == group
    tiles = tl.sum(tl.where(mine_E, tiles_E, 0), axis=0)
    inner = tile - tl.sum(tl.where(mine_E, tile_ends_E - tiles_E, 0), axis=0) * columns
    band = inner // (BAND * columns)
    height = tl.minimum(tiles - band * BAND, BAND)
    inner = inner % (BAND * columns)
    return group, band * BAND + inner % height, inner // height


@triton.jit
def _rows_kernel(
    x_desc,
    weight_desc,
    y_ptr,
    ends_ptr,
    outputs,
    inputs,
    GROUPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """y = x · weightᵀ (weight [E, outputs, inputs]), or x · weight where TRANSPOSED (weight [E, inputs, outputs])."""
    tiles_E, tile_ends_E = group_tiles(ends_ptr, BLOCK_M, GROUPS, BLOCK_E)
    columns = tl.cdiv(outputs, BLOCK_J)
    total = tl.sum(tiles_E, axis=0) * columns
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        group, tile_m, tile_j = place_of(tile, tiles_E, tile_ends_E, columns, BAND, BLOCK_E)
        end = tl.load(ends_ptr + group)
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        row, column = start + tile_m * BLOCK_M, tile_j * BLOCK_J
        y_MJ = tl.zeros((BLOCK_M, BLOCK_J), dtype=tl.float32)
        for first in range(0, inputs, BLOCK_R):
            x_MR = x_desc.load([row, first])
            if TRANSPOSED:
                weight_RJ = weight_desc.load([group, first, column]).reshape(BLOCK_R, BLOCK_J)
            else:
                weight_RJ = weight_desc.load([group, column, first]).reshape(BLOCK_J, BLOCK_R).T
            y_MJ = tl.dot(x_MR, weight_RJ, y_MJ)
        row_M, column_J = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_J)
        tl.store(
            y_ptr + row_M.to(tl.int64)[:, None] * outputs + column_J[None, :],
            y_MJ.to(y_ptr.dtype.element_ty),
            mask=(row_M < end)[:, None] & (column_J < outputs)[None, :],
        )


def programs(device: torch.device) -> int:
    """One for each processor."""
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the kernels can take them; copies only where they have to be."""
    if not tensors[0].is_cuda:
        # The interpreter's tl.dot multiplies the bits of bfloat16 as if they were integers.
        return tuple(tensor.float().contiguous() for tensor in tensors)
    contiguous = (tensor.contiguous() for tensor in tensors)
    # TMA reads from multiples of 16 bytes.
    return tuple(tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in contiguous)


def multiply_rows(x_TR: Tensor, weight_EAB: Tensor, ends_E: Tensor, transposed: bool) -> Tensor:
    """Rows times their group's weightᵀ [E, outputs, inputs], or times its weight where `transposed`."""
    groups, outputs, inputs = weight_EAB.shape
    if transposed:
        outputs, inputs = inputs, outputs
    y_TJ = torch.empty(x_TR.shape[0], outputs, dtype=x_TR.dtype, device=x_TR.device)
    if not y_TJ.numel():
        return y_TJ
    x_TR, weight_EAB = operands(x_TR, weight_EAB)
    if not x_TR.is_cuda:
        tile = TILE_ON_CPU
    elif len(x_TR) <= FEW_ROWS * groups:
        tile = FEW_ROWS_TILE
    else:
        tile = TILE if transposed or inputs < LONG_SUM else LONG_SUM_TILE
    weight_box = [1, tile["BLOCK_R"], tile["BLOCK_J"]] if transposed else [1, tile["BLOCK_J"], tile["BLOCK_R"]]
    _rows_kernel[(programs(x_TR.device),)](
        TensorDescriptor.from_tensor(x_TR, [tile["BLOCK_M"], tile["BLOCK_R"]]),
        TensorDescriptor.from_tensor(weight_EAB, weight_box),
        y_TJ,
        ends_E.contiguous(),
        outputs,
        inputs,
        GROUPS=groups,
        TRANSPOSED=transposed,
        BAND=BAND,
        BLOCK_E=triton.next_power_of_2(groups),
        **tile,
    )
    return y_TJ


def _launch(x_TK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    return multiply_rows(x_TK, weight_ENK, ends_E, transposed=False)


_grouped_linear = Operation("grouped_linear", _launch)


@_grouped_linear.shapes
def _(x_TK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], weight_ENK.shape[1])


def _launch_backward(grad_TN: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    return multiply_rows(grad_TN, weight_ENK, ends_E, transposed=True)


rows_backward = Operation("grouped_linear_backward", _launch_backward)


@rows_backward.shapes
def _(grad_TN: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    return grad_TN.new_empty(grad_TN.shape[0], weight_ENK.shape[2])


def weights_backward(grad_TN: Tensor, x_TK: Tensor, ends_E: Tensor) -> Tensor:
    """gradᵀ · x over each group's rows, by torch's product. [E, N, K]."""
    if not len(x_TK):
        return x_TK.new_zeros(len(ends_E), grad_TN.shape[1], x_TK.shape[1])
    return functional.grouped_mm(grad_TN.contiguous().t(), x_TK.contiguous(), offs=ends_E)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_TN):
    x_TK, weight_ENK, ends_E = ctx.saved_tensors
    grad_x_TK = rows_backward(grad_TN, weight_ENK, ends_E) if ctx.needs_input_grad[0] else None
    grad_weight_ENK = weights_backward(grad_TN, x_TK, ends_E) if ctx.needs_input_grad[1] else None
    return grad_x_TK, grad_weight_ENK, None


_grouped_linear.gradients(_gradients, _keep)


def grouped_linear(x_TK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """Row t of group e becomes x_t · weight_eᵀ."""
    return _grouped_linear(x_TK, weight_ENK, offsets_E)
