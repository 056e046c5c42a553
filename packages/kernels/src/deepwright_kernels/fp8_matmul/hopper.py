"""Block-scaled FP8 products as one CUDA kernel for Hopper (`hopper.cu`): tile sizes, launches, torch operators.

The three operators differ in where a tile's rows, columns and part of K come from, which the kernel works out on the
device: nothing here waits for it. Leaves out outputs whose rows are no multiples of 16 bytes.

Shapes: M rows of A and of the output, N rows of B and columns of the output, K columns of both, T = M or K where it
counts tokens, E groups, U = ⌈N / 128⌉, V = ⌈K / 128⌉.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import LARGEST_SHARED_BYTES, TensorMap, kernel
from ..fp8_layout import SCALES_MULTIPLE, rounded_up

SOURCE = Path(__file__).with_name("hopper.cu")
THREADS = 384
BLOCK_M = BLOCK_K = 128
DENSE, GROUPED, OUTER = range(3)


@dataclass(frozen=True)
class Tiling:
    """waves * wave_columns columns of a tile; blocks of threads that share rows; rows of tiles walked together."""

    waves: int
    wave_columns: int
    cluster: int
    raster: int
    order: int = 0
    stream: int = 0
    registers: int = 0
    copies: int = 0

    @property
    def columns(self) -> int:
        return self.waves * self.wave_columns

    def shared_bytes(self, row_scales_b: bool) -> tuple[int, int]:
        """How many stages fit, and the shared memory that they take."""
        stage = (BLOCK_M + self.columns) * BLOCK_K + 4 * BLOCK_M + 4 * self.columns * row_scales_b + 16
        boxes = self.copies * 4 * 64 * 128
        stages = (LARGEST_SHARED_BYTES - boxes) // stage
        return stages, boxes + stages * stage


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _scales_for_copies(scale_MV: Tensor) -> Tensor:
    """Row scales as the copy engine sees them, [V, M]; moved if they begin within 16 bytes (a slice of rows)."""
    rows, across = scale_MV.shape
    stride = scale_MV.stride(1) if across > 1 else rounded_up(rows, SCALES_MULTIPLE)
    scale_VM = scale_MV.as_strided((across, rows), (stride, 1))
    if scale_VM.data_ptr() % 16:
        moved_VM = scale_VM.new_empty(across, rounded_up(rows, SCALES_MULTIPLE))[:, :rows]
        return moved_VM.copy_(scale_VM)
    return scale_VM


def launch(
    schedule: int,
    a_MK: Tensor,
    a_scale_MV: Tensor,
    b: Tensor,
    b_scale: Tensor,
    ends_E: Tensor | None,
    out: Tensor,
    tiling: Tiling,
) -> None:
    """Write `out`: [M, N], or [E, M, N] for the outer product. b: [N, K], or [E, N, K] where rows are grouped."""
    if 0 in (out.numel(), a_MK.numel(), b.numel()):
        out.zero_()
        return
    rows, k = a_MK.shape
    columns = out.shape[-1]
    groups = 0 if ends_E is None else len(ends_E)
    row_scales_b = schedule == OUTER or (schedule == DENSE and b_scale.shape[0] == columns)
    stages, shared_bytes = tiling.shared_bytes(row_scales_b)
    tiles = -(-rows // BLOCK_M) * -(-columns // (tiling.columns * tiling.cluster))
    tiles *= groups if schedule == OUTER else 1
    grid = min(_multiprocessors(a_MK.device.index) // tiling.cluster, tiles) * tiling.cluster
    product = kernel(
        SOURCE,
        "fp8_product",
        {
            "SCHEDULE": schedule,
            "WAVES": tiling.waves,
            "WAVE_N": tiling.wave_columns,
            "WAVE_STEPS": tiling.wave_columns // 16,
            "STAGES": stages,
            "CLUSTER": tiling.cluster,
            "RASTER": tiling.raster,
            "ORDER": tiling.order,
            "STREAM": tiling.stream,
            "REGISTERS_A": tiling.registers,
            "COPIES_OUT": tiling.copies,
            "ROW_SCALES_B": int(row_scales_b),
            "FLOAT_OUT": int(out.dtype == torch.float32),
        },
        shared_bytes,
        a_MK.device,
    )
    a_scale_map = TensorMap(_scales_for_copies(a_scale_MV), (1, BLOCK_M), swizzle=0)
    b_box = (tiling.columns, BLOCK_K) if schedule != GROUPED else (1, tiling.columns, BLOCK_K)
    product.launch(
        (grid, 1, 1),
        (THREADS, 1, 1),
        TensorMap(a_MK, (BLOCK_M // tiling.cluster, BLOCK_K)),
        TensorMap(b, b_box),
        a_scale_map,
        TensorMap(_scales_for_copies(b_scale), (1, tiling.columns), swizzle=0) if row_scales_b else a_scale_map,
        TensorMap(out, (*[1] * (out.ndim - 2), 64, 128 // out.element_size())),
        b_scale,
        b_scale if ends_E is None else ends_E,
        out,
        rows,
        columns,
        k,
        groups,
    )


def _tiling(schedule: int, rows: int, columns: int) -> Tiling:
    return Tiling(waves=2, wave_columns=128, cluster=1, raster=8)


@torch.library.custom_op("deepwright::fp8_matmul_hopper", mutates_args=(), device_types="cuda")
def fp8_matmul(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a · bᵀ [M, N]; b_scale has a row for each row of b, or for each 128 of them."""
    y_MN = a_MK.new_empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype)
    launch(DENSE, a_MK, a_scale_MV, b_NK, b_scale, None, y_MN, _tiling(DENSE, *y_MN.shape))
    return y_MN


@fp8_matmul.register_fake
def _(a_MK: Tensor, a_scale_MV: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype)


@torch.library.custom_op("deepwright::fp8_grouped_matmul_hopper", mutates_args=(), device_types="cuda")
def fp8_grouped_matmul(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Row t of group e becomes a_t · b_eᵀ, [T, N]; rows after the last end become zero."""
    y_TN = a_TK.new_empty(a_TK.shape[0], b_ENK.shape[1], dtype=dtype)
    launch(GROUPED, a_TK, a_scale_TV, b_ENK, b_scale_EUV, ends_E, y_TN, _tiling(GROUPED, *y_TN.shape))
    return y_TN


@fp8_grouped_matmul.register_fake
def _(
    a_TK: Tensor, a_scale_TV: Tensor, b_ENK: Tensor, b_scale_EUV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    return a_TK.new_empty(a_TK.shape[0], b_ENK.shape[1], dtype=dtype)


@torch.library.custom_op("deepwright::fp8_grouped_outer_hopper", mutates_args=(), device_types="cuda")
def fp8_grouped_outer(
    a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """The sums over each group's columns, [E, M, N]; zeros for an empty group."""
    y_EMN = a_MT.new_empty(ends_E.shape[0], a_MT.shape[0], b_NT.shape[0], dtype=dtype)
    launch(OUTER, a_MT, a_scale_MV, b_NT, b_scale_NV, ends_E, y_EMN, _tiling(OUTER, *y_EMN.shape[1:]))
    return y_EMN


@fp8_grouped_outer.register_fake
def _(a_MT: Tensor, a_scale_MV: Tensor, b_NT: Tensor, b_scale_NV: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    return a_MT.new_empty(ends_E.shape[0], a_MT.shape[0], b_NT.shape[0], dtype=dtype)
