"""Activations in FP8 as DeepSeek-V3 trains with them, in plain torch. The specification.

Each 128 values along a row share one scale, amax / 448 with amax at least 1e-4; the values are stored as e4m3 of
x · (1 / scale). Columns are the rows of the transpose.

Source: DeepSeek-V3 report, section 3.3.2 (fine-grained quantisation) and figure 7.

Shapes: T tokens, K columns, V = ⌈K/128⌉ and U = ⌈T/128⌉ blocks.
"""

from __future__ import annotations

from torch import Tensor

from ..fp8_blocks.reference import quantise_fp8_blocks
from ..fp8_layout import BLOCK, empty_rows


def quantise_fp8_rows(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [T, K] and scales [T, V]."""
    values_TK, scale_TV = quantise_fp8_blocks(x_TK, (1, BLOCK), power_of_two_scales)
    room_TK, scale_room_TV = empty_rows(x_TK.shape[0], x_TK.shape[1], x_TK.device)
    return room_TK.copy_(values_TK), scale_room_TV.copy_(scale_TV)


def quantise_fp8_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [K, T] and scales [K, U]."""
    return quantise_fp8_rows(x_TK.t(), power_of_two_scales)


def quantise_fp8_rows_and_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both, rows first."""
    return *quantise_fp8_rows(x_TK, power_of_two_scales), *quantise_fp8_columns(x_TK, power_of_two_scales)
