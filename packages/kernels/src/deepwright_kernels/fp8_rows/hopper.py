"""Quantising bf16 activations along their columns, and along both directions, by a CUDA kernel (`tile.cu`).

Columns are what it is for: along rows alone Triton already moves bytes as fast as a copy does.

Shapes: T tokens, K columns, U = ⌈T/128⌉ and V = ⌈K/128⌉ blocks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import kernel
from ..fp8_layout import ROW_BYTES, blocks, empty_rows

SOURCE = Path(__file__).with_name("tile.cu")
THREADS = 256
BLOCKS = {False: 3, True: 2}  # on a multiprocessor, without rows and with them


def aligned(x_TK: Tensor) -> Tensor:
    """x in rows that begin at multiples of 16 bytes; a copy only when it has to be one."""
    right = x_TK.stride(1) == 1 and x_TK.stride(0) * x_TK.element_size() % ROW_BYTES == 0
    return x_TK if right and x_TK.data_ptr() % ROW_BYTES == 0 else x_TK.clone(memory_format=torch.contiguous_format)


def _launch(
    x_TK: Tensor, rows: tuple[Tensor, Tensor] | None, columns: tuple[Tensor, Tensor], power_of_two_scales: bool
) -> None:
    """Fill `columns`, and `rows` as well if they are there."""
    if not x_TK.numel():
        return
    x_TK = aligned(x_TK)
    tokens, width = x_TK.shape
    values_TK, scale_TV = rows or columns
    values_KT, scale_KU = columns
    defines = {
        "SWIGLU": 0,
        "ROWS": int(rows is not None),
        "POWER_OF_TWO": int(power_of_two_scales),
        "BLOCKS": BLOCKS[rows is not None],
    }
    kernel(SOURCE, "fp8_tile", defines, 0, x_TK.device).launch(
        (blocks(tokens) * blocks(width), 1, 1),
        (THREADS, 1, 1),
        x_TK,
        values_TK,
        scale_TV,
        values_KT,
        scale_KU,
        tokens,
        width,
        x_TK.stride(0),
        values_TK.stride(0),
        scale_TV.stride(1),
        values_KT.stride(0),
        scale_KU.stride(1),
    )


def _launch_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    columns = empty_rows(x_TK.shape[1], x_TK.shape[0], x_TK.device)
    _launch(x_TK, None, columns, power_of_two_scales)
    return columns


_columns = torch.library.custom_op("deepwright::quantise_fp8_columns_hopper", _launch_columns, mutates_args=())


@_columns.register_fake
def _(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    return empty_rows(x_TK.shape[1], x_TK.shape[0], x_TK.device)


def _launch_both(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x_TK.shape
    rows, columns = empty_rows(tokens, width, x_TK.device), empty_rows(width, tokens, x_TK.device)
    _launch(x_TK, rows, columns, power_of_two_scales)
    return *rows, *columns


_both = torch.library.custom_op("deepwright::quantise_fp8_rows_and_columns_hopper", _launch_both, mutates_args=())


@_both.register_fake
def _(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x_TK.shape
    return *empty_rows(tokens, width, x_TK.device), *empty_rows(width, tokens, x_TK.device)


def quantise_fp8_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [K, T] and scales [K, U]."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_columns if torch.compiler.is_compiling() else _launch_columns)(x_TK, power_of_two_scales)


def quantise_fp8_rows_and_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both, rows first: values [T, K], scales [T, V], values [K, T], scales [K, U]."""
    return (_both if torch.compiler.is_compiling() else _launch_both)(x_TK, power_of_two_scales)
