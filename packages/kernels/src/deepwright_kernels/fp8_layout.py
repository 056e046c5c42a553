"""How operands of block-scaled FP8 products lie in memory, and sentences about operands that lie otherwise.

Values are e4m3; a scale is float32 and multiplies: x ≈ value · scale. Two kinds of scales:
- row scales: one for 128 values of a row. For a matrix [T, K] they have the shape [T, ⌈K/128⌉] and lie token by token
  (strides 1 and T rounded up to a multiple of 4), as the copy engine and torch's scaled product want them.
- block scales: one for 128 x 128 values of a weight [N, K], of the shape [⌈N/128⌉, ⌈K/128⌉], as checkpoints hold them.

Rows of values begin at multiples of 16 bytes. A matrix transposed along its tokens is stored with rows that are rounded
up to that, whatever the number of tokens; what lies between the rows is never read.

Leaves out: the arithmetic, which is in the operators' references.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import require_device, require_dtype, require_shape, shape_of

BLOCK = 128
ROW_BYTES = 16  # the copy engine's unit; an e4m3 value is one byte
SCALES_MULTIPLE = 4  # as many float32 scales are 16 bytes

VALUES = (torch.float8_e4m3fn,)
PRODUCTS = (torch.bfloat16, torch.float32)


def blocks(size: int) -> int:
    """Blocks of 128 that cover `size`; the last one may be partial."""
    return -(-size // BLOCK)


def rounded_up(size: int, multiple: int) -> int:
    """The next multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def empty_row_scales(rows: int, columns: int, device: torch.device) -> Tensor:
    """Room for the row scales of a matrix [rows, columns]: [rows, ⌈columns/128⌉], token by token."""
    across = max(rounded_up(rows, SCALES_MULTIPLE), SCALES_MULTIPLE)
    scale = torch.empty(blocks(columns), across, dtype=torch.float32, device=device).t()
    return scale if across == rows else scale[:rows]


def empty_values(rows: int, columns: int, device: torch.device) -> Tensor:
    """Room for e4m3 values [rows, columns] whose rows begin at multiples of 16 bytes."""
    length = max(rounded_up(columns, ROW_BYTES), ROW_BYTES)
    values = torch.empty(rows, length, dtype=torch.float8_e4m3fn, device=device)
    return values if length == columns else values[:, :columns]


def empty_rows(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for values and row scales of a matrix [rows, columns]."""
    return empty_values(rows, columns, device), empty_row_scales(rows, columns, device)


def require_values(operator: str, argument: str, values: Tensor, expected: tuple[int | None, ...], names: str) -> None:
    """Refuse what is not e4m3 in rows that begin at multiples of 16 bytes."""
    require_shape(operator, argument, values, expected, names)
    require_dtype(operator, argument, values, VALUES)
    if values.numel():
        aligned = values.stride(-1) == 1 and all(stride % ROW_BYTES == 0 for stride in values.stride()[:-1])
        if not torch.compiler.is_compiling():  # torch.compile cannot trace where a tensor begins
            aligned = aligned and values.storage_offset() % ROW_BYTES == 0
        if not aligned:
            raise ValueError(
                f"{operator}: {argument} of the shape {shape_of(values)} has the strides {list(values.stride())}; "
                f"expected values side by side in rows that begin at multiples of {ROW_BYTES} bytes, so sizes that are "
                f"multiples of {ROW_BYTES} or rows that are padded, as the quantising operators give them."
            )


def require_row_scales(operator: str, argument: str, scale: Tensor, values: Tensor) -> None:
    """Refuse what is not the row scales of these values [rows, columns], lying token by token."""
    rows, columns = values.shape
    require_shape(operator, argument, scale, (rows, blocks(columns)), "[rows, ⌈columns/128⌉]")
    require_dtype(operator, argument, scale, (torch.float32,))
    require_device(operator, argument, scale, values.device)
    if scale.numel():
        right = (rows == 1 or scale.stride(0) == 1) and (
            scale.shape[1] == 1 or (scale.stride(1) >= rows and scale.stride(1) % SCALES_MULTIPLE == 0)
        )
        if not right:
            raise ValueError(
                f"{operator}: {argument} has the strides {list(scale.stride())}; expected row scales that lie token by "
                f"token, the strides 1 and {max(rounded_up(rows, SCALES_MULTIPLE), SCALES_MULTIPLE)}, as the "
                "quantising operators give them."
            )


def require_block_scales(operator: str, argument: str, scale: Tensor, values: Tensor) -> None:
    """Refuse what is not the contiguous block scales of a weight [..., N, K]."""
    expected = (*values.shape[:-2], blocks(values.shape[-2]), blocks(values.shape[-1]))
    require_shape(operator, argument, scale, expected, "[..., ⌈N/128⌉, ⌈K/128⌉]")
    require_dtype(operator, argument, scale, (torch.float32,))
    require_device(operator, argument, scale, values.device)
    if not scale.is_contiguous():
        raise ValueError(f"{operator}: {argument} has the strides {list(scale.stride())}; expected contiguous scales.")


def require_ends(operator: str, ends_E: Tensor, groups: int | None, device: torch.device) -> None:
    """Refuse what cannot be the ends of groups. Their values are not checked: the host would wait for the device."""
    require_shape(operator, "ends_E", ends_E, (groups,), "[E]")
    require_dtype(operator, "ends_E", ends_E, (torch.int32,))
    require_device(operator, "ends_E", ends_E, device)
    if not ends_E.is_contiguous():
        raise ValueError(f"{operator}: ends_E has the strides {list(ends_E.stride())}; expected contiguous ends.")


def ragged_output(columns: int, dtype: torch.dtype) -> str | None:
    """Why a kernel that writes 16 bytes at a time cannot write rows of so many values, or None."""
    unit = ROW_BYTES // dtype.itemsize
    if columns % unit == 0:
        return None
    return f"it writes {unit} values at a time and rows of the output have {columns}"
