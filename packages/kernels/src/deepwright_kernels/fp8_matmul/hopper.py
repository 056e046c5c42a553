"""Block-scaled FP8 products as one CUDA kernel for Hopper (`hopper.cu`): tile sizes, launches, torch operators.

The three operators differ in where a tile's rows, columns and part of K come from, which the kernel works out on the
device: nothing here waits for it. Leaves out what the copy engine cannot read: see `why_not`.

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

    @property
    def columns(self) -> int:
        return self.waves * self.wave_columns

    def shared_bytes(self, row_scales_b: bool) -> tuple[int, int]:
        """How many stages fit, and the shared memory that they take."""
        stage = (BLOCK_M + self.columns) * BLOCK_K + 4 * BLOCK_M + 4 * self.columns * row_scales_b + 16
        stages = LARGEST_SHARED_BYTES // stage
        return stages, stages * stage


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def launch(
    schedule: int,
    a_MK: Tensor,
    a_scale_MV: Tensor,
    b_NK: Tensor,
    b_scale: Tensor,
    row_scales_b: bool,
    ends_E: Tensor | None,
    out: Tensor,
    tiling: Tiling,
) -> None:
    """Write `out`: [M, N], or [E, M, N] for the outer product."""
    rows, k = a_MK.shape
    columns = out.shape[-1]
    groups = 0 if ends_E is None else len(ends_E)
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
            "ROW_SCALES_B": int(row_scales_b),
            "FLOAT_OUT": int(out.dtype == torch.float32),
        },
        shared_bytes,
        a_MK.device,
    )
    a_scale_map = TensorMap(a_scale_MV.t(), (1, BLOCK_M), swizzle=0)
    product.launch(
        (grid, 1, 1),
        (THREADS, 1, 1),
        TensorMap(a_MK, (BLOCK_M // tiling.cluster, BLOCK_K)),
        TensorMap(b_NK, (tiling.columns, BLOCK_K)),
        a_scale_map,
        TensorMap(b_scale.t(), (1, tiling.columns), swizzle=0) if row_scales_b else a_scale_map,
        b_scale,
        b_scale if ends_E is None else ends_E,
        out,
        rows,
        columns,
        k,
        groups,
    )
