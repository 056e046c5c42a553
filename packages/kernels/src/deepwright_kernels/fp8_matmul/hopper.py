"""Block-scaled FP8 products as one CUDA kernel for Hopper (`hopper.cu`): tile sizes, launches, torch operators.

The three operators differ in where a tile's rows, columns and part of K come from, which the kernel works out on the
device: nothing here waits for it. Leaves out outputs whose rows are no multiples of 16 bytes.

Shapes: M rows of A and of the output, N rows of B and columns of the output, K columns of both, T = M or K where it
counts tokens, E groups, U = ⌈N / 128⌉, V = ⌈K / 128⌉.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import LARGEST_SHARED_BYTES, Kernel, TensorMap, kernel
from ..fp8_layout import BLOCK, SCALES_MULTIPLE, blocks, rounded_up
from ..operation import Operation

SOURCE = Path(__file__).with_name("hopper.cu")
THREADS = 384
DENSE, GROUPED, OUTER = range(3)
BOX_ROWS, BOX_BYTES = 64, 128  # of bfloat16 output on its way through shared memory
RASTER = 8  # rows of tiles that are walked together
# Of tiles of 128 rows and one or two times 128 columns, on an H200: microseconds for 128 of K, and for the rest.
STEP, REST = {1: 0.46, 2: 0.76}, {1: 2.3, 2: 4.6}


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _product(schedule: int, waves: int, row_scales_b: bool, dtype: torch.dtype, device: torch.device) -> Kernel:
    columns = waves * BLOCK
    scales = 4 * BLOCK + (4 * columns if row_scales_b else 16)
    stage = (BLOCK + columns) * BLOCK + scales + 32  # the last for its two barriers and a tile's place
    boxes = 0 if dtype == torch.float32 else 4 * BOX_ROWS * BOX_BYTES
    stages = (LARGEST_SHARED_BYTES - boxes) // stage
    defines = {
        "SCHEDULE": schedule,
        "WAVES": waves,
        "STAGES": stages,
        "RASTER": RASTER,
        "ROW_SCALES_B": int(row_scales_b),
        "FLOAT_OUT": int(dtype == torch.float32),
    }
    return kernel(SOURCE, "fp8_product", defines, boxes + stages * stage, device)


def _tiles(waves: int, rows: int, columns: int, matrices: int) -> int:
    return matrices * blocks(rows) * -(-columns // (waves * BLOCK))


def _waves(rows: int, columns: int, matrices: int, along: int, multiprocessors: int) -> int:
    """Narrow or wide tiles, whichever are done first. along: blocks of K that a tile has (on average)."""

    def microseconds(waves: int) -> float:
        turns = -(-_tiles(waves, rows, columns, matrices) // multiprocessors)
        return turns * (along * STEP[waves] + REST[waves])

    return min((2, 1), key=microseconds)


def _row_scales(scale_MV: Tensor) -> tuple[Tensor, int]:
    """Row scales and how far apart those of two blocks are; moved if they begin within 16 bytes (a slice of rows)."""
    rows, across = scale_MV.shape
    if scale_MV.data_ptr() % 16:
        moved_VM = scale_MV.new_empty(across, rounded_up(rows, SCALES_MULTIPLE))
        moved_VM[:, :rows] = scale_MV.t()
        return moved_VM, moved_VM.shape[1]
    return scale_MV, scale_MV.stride(1)


def _launch(
    schedule: int, a_MK: Tensor, a_scale_MV: Tensor, b: Tensor, b_scale: Tensor, ends_E: Tensor | None, out: Tensor
) -> Tensor:
    """Write `out`: [M, N], or [E, M, N] for the outer product. b: [N, K], or [E, N, K] where rows are grouped."""
    if 0 in (out.numel(), a_MK.numel(), b.numel()):
        return out.zero_()
    (rows, k), columns, device = a_MK.shape, out.shape[-1], a_MK.device
    groups = 0 if ends_E is None else len(ends_E)
    row_scales_b = schedule == OUTER or (schedule == DENSE and b_scale.shape[0] == columns)
    matrices = groups if schedule == OUTER else 1
    multiprocessors = _multiprocessors(device)
    waves = _waves(rows, columns, matrices, blocks(k) // matrices, multiprocessors)
    b_box = (waves * BLOCK, BLOCK)
    a_scale, a_scale_stride = _row_scales(a_scale_MV)
    b_scale, b_scale_stride = _row_scales(b_scale) if row_scales_b else (b_scale, 0)
    boxes = (*[1] * (out.ndim - 2), BOX_ROWS, BOX_BYTES // out.element_size())
    _product(schedule, waves, row_scales_b, out.dtype, device).launch(
        (min(multiprocessors, _tiles(waves, rows, columns, matrices)), 1, 1),
        (THREADS, 1, 1),
        TensorMap(a_MK, (BLOCK, BLOCK)),
        TensorMap(b, (1, *b_box) if schedule == GROUPED else b_box),
        *([] if out.dtype == torch.float32 else [TensorMap(out, boxes)]),
        a_scale,
        b_scale,
        b_scale if ends_E is None else ends_E,
        out,
        rows,
        columns,
        k,
        groups,
        a_scale_stride,
        b_scale_stride,
    )
    return out


def _dense(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _launch(DENSE, a_MK, a_scale_MV, b_NK, b_scale, None, _empty_dense(a_MK, a_scale_MV, b_NK, b_scale, dtype))


_dense_operation = Operation("fp8_matmul_hopper", _dense)


@_dense_operation.shapes
def _empty_dense(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype)


def fp8_matmul(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a · bᵀ [M, N]; b_scale has a row for each row of b, or for each 128 of them."""
    y_MN: Tensor = _dense_operation(a_MK, a_scale_MV, b_NK, b_scale, dtype)
    return y_MN


def _grouped(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    y_TN = _empty_grouped(a_TK, a_scale_TV, b_ENK, b_scale_EUV, ends_E, dtype)
    return _launch(GROUPED, a_TK, a_scale_TV, b_ENK, b_scale_EUV, ends_E, y_TN)


_grouped_operation = Operation("fp8_grouped_matmul_hopper", _grouped)


@_grouped_operation.shapes
def _empty_grouped(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    return a_TK.new_empty(a_TK.shape[0], b_ENK.shape[1], dtype=dtype)


def fp8_grouped_matmul(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Row t of group e becomes a_t · b_eᵀ, [T, N]; rows after the last end become zero."""
    y_TN: Tensor = _grouped_operation(a_TK, a_scale_TV, b_ENK, b_scale_EUV, ends_E, dtype)
    return y_TN


def _outer(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    y_EMN = _empty_outer(a_MT, a_scale_MV, b_NT, b_scale_NV, ends_E, dtype)
    return _launch(OUTER, a_MT, a_scale_MV, b_NT, b_scale_NV, ends_E, y_EMN)


_outer_operation = Operation("fp8_grouped_outer_hopper", _outer)


@_outer_operation.shapes
def _empty_outer(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    return a_MT.new_empty(ends_E.shape[0], a_MT.shape[0], b_NT.shape[0], dtype=dtype)


def fp8_grouped_outer(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """The sums over each group's columns, [E, M, N]; zeros for an empty group."""
    y_EMN: Tensor = _outer_operation(a_MT, a_scale_MV, b_NT, b_scale_NV, ends_E, dtype)
    return y_EMN
