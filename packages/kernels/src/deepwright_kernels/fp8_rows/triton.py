"""Quantising activations as Triton kernels, each of which reads every value once.

Along rows, a program takes a few tokens of some blocks of 128 columns; the absolute maximum of a block is found in
registers. Along columns, a program takes 128 tokens of 32 columns, and the values go through shared memory once, as
bytes already packed along the tokens, to be written as rows of the transpose. Both at once is the second kernel with
the first one's output as well.

Maxima are taken of the bits of absolute values, as integers: those order as the values do, with infinity above every
number and NaN above infinity, so what is not finite is never lost.

Shapes: T tokens, K columns, V = ⌈K/128⌉ and U = ⌈T/128⌉ blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from ..fp8_layout import BLOCK, blocks, empty_rows

ROWS_TOKENS = 8
ROWS_BLOCKS = 4
ROWS_WARPS = 4
COLUMNS_WIDTH = 32
COLUMNS_WARPS = 2
BOTH_TOKENS = 32
BOTH_WIDTH = 32
BOTH_WARPS = 4

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def scale_of(bits, POWER_OF_TWO: tl.constexpr):
    """amax / 448 of the bits of absolute maxima: amax at least 1e-4, NaN and infinity stay, perhaps a power of two."""
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < 1e-4, 1e-4, amax), 448.0)
    if POWER_OF_TWO:
        # Adding all ones below the exponent carries into it unless the mantissa is zero.
        power = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(bits < 0x7F800000, power.to(tl.float32, bitcast=True), scale)
    return scale


@triton.jit
def absolute_bits(x):
    """The bits of |x|, which order as |x| does."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_e4m3(x):
    """The nearest e4m3 value, of two the even one."""
    if INTERPRETED:  # the interpreter's cast rounds otherwise and loses NaN
        bits = absolute_bits(x)
        large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = ((bits.to(tl.float32, bitcast=True) * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
        code = tl.where(bits < 0x3C800000, small, large)  # 2⁻⁶ is the smallest normal value
        code = tl.where(bits > 0x43E80000, 0x7F, code)  # beyond 464, and NaN
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        values = (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        values = x.to(tl.float8e4nv)
    return values


@triton.jit
def load_tile(x_ptr, token_T, column_K, tokens, columns, stride):
    """A tile in float32, zeros beyond the last token and column."""
    return tl.load(
        x_ptr + token_T.to(tl.int64)[:, None] * stride + column_K[None, :],
        mask=(token_T[:, None] < tokens) & (column_K[None, :] < columns),
        other=0.0,
    ).to(tl.float32)


@triton.jit
def store_rows(
    x_TK,
    token_T,
    column_K,
    values_ptr,
    scale_ptr,
    tokens,
    columns,
    values_stride,
    scale_stride,
    POWER_OF_TWO: tl.constexpr,
):
    """Quantise a float32 tile of whole blocks of 128 columns along its rows, and store it."""
    TOKENS: tl.constexpr = x_TK.shape[0]
    BLOCKS: tl.constexpr = x_TK.shape[1] // 128
    x_TBK = tl.reshape(x_TK, (TOKENS, BLOCKS, 128))
    scale_TB = scale_of(tl.max(absolute_bits(x_TBK), axis=2), POWER_OF_TWO)
    values_TBK = to_e4m3(x_TBK * tl.div_rn(1.0, scale_TB)[:, :, None])
    # Columns up to the stride, not to the last one: the zeros in between keep the stores wide.
    tl.store(
        values_ptr + token_T.to(tl.int64)[:, None] * values_stride + column_K[None, :],
        tl.reshape(values_TBK, (TOKENS, BLOCKS * 128)),
        mask=(token_T[:, None] < tokens) & (column_K[None, :] < values_stride),
    )
    block_B = tl.min(column_K, axis=0) // 128 + tl.arange(0, BLOCKS)
    tl.store(
        scale_ptr + block_B[None, :] * scale_stride + token_T[:, None],
        scale_TB,
        mask=(token_T[:, None] < tokens) & (block_B[None, :] * 128 < columns),
    )


@triton.jit
def tokens_of(block, ROWS: tl.constexpr):
    """The 128 tokens of a block in an order for which their columns lie side by side in a thread.

    A thread that loads 16 bytes of a row holds the same columns of every ROWS-th row of a tile. So neighbouring tokens
    are given to rows that are ROWS apart, and what a thread has of a column is a piece of a row of the transpose.
    """
    row_T = tl.arange(0, 128)
    return block * 128 + row_T % ROWS * (128 // ROWS) + row_T // ROWS


@triton.jit
def transpose(values_TK, ROWS: tl.constexpr):
    """The transpose [K, 128] of a tile whose tokens are in the order of `tokens_of`, in their own order."""
    WIDTH: tl.constexpr = values_TK.shape[1]
    values_PRK = tl.reshape(values_TK, (128 // ROWS, ROWS, WIDTH))
    return tl.reshape(tl.permute(values_PRK, (2, 1, 0)), (WIDTH, 128))


@triton.jit
def store_columns(
    x_TK,
    block,
    column_K,
    values_ptr,
    scale_ptr,
    columns,
    values_stride,
    scale_stride,
    ROWS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Quantise a float32 tile of the tokens `tokens_of(block, ROWS)` along its columns, and store the transpose."""
    scale_K = scale_of(tl.max(absolute_bits(x_TK), axis=0), POWER_OF_TWO)
    values_TK = to_e4m3(x_TK * tl.div_rn(1.0, scale_K)[None, :])
    token_T = block * 128 + tl.arange(0, 128)
    tl.store(
        values_ptr + column_K.to(tl.int64)[:, None] * values_stride + token_T[None, :],
        transpose(values_TK, ROWS),
        mask=(column_K[:, None] < columns) & (token_T[None, :] < values_stride),
    )
    tl.store(scale_ptr + block * scale_stride + column_K, scale_K, mask=column_K < columns)


@triton.jit
def _rows_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    tokens,
    columns,
    x_stride,
    values_stride,
    scale_stride,
    POWER_OF_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCKS * 128)
    token_T = tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)
    column_K = tl.program_id(0) % across * (BLOCKS * 128) + tl.arange(0, BLOCKS * 128)
    store_rows(
        load_tile(x_ptr, token_T, column_K, tokens, columns, x_stride),
        token_T,
        column_K,
        values_ptr,
        scale_ptr,
        tokens,
        columns,
        values_stride,
        scale_stride,
        POWER_OF_TWO,
    )


@triton.jit
def _columns_kernel(
    x_ptr,
    rows_ptr,
    rows_scale_ptr,
    columns_ptr,
    columns_scale_ptr,
    tokens,
    columns,
    x_stride,
    rows_stride,
    rows_scale_stride,
    columns_stride,
    columns_scale_stride,
    BOTH: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    # A tile of 128 tokens and, with rows, 128 columns, in pieces that leave registers for several programs. What the
    # rows have brought is then found in the first-level cache.
    TILE: tl.constexpr = 128 if BOTH else WIDTH
    across = tl.cdiv(columns, TILE)
    block = tl.program_id(0) // across
    first_K = tl.program_id(0) % across * TILE
    if BOTH:
        for start in tl.static_range(0, 128, TOKENS):
            token_T = block * 128 + start + tl.arange(0, TOKENS)
            column_K = first_K + tl.arange(0, 128)
            store_rows(
                load_tile(x_ptr, token_T, column_K, tokens, columns, x_stride),
                token_T,
                column_K,
                rows_ptr,
                rows_scale_ptr,
                tokens,
                columns,
                rows_stride,
                rows_scale_stride,
                POWER_OF_TWO,
            )
    for start in tl.static_range(0, TILE, WIDTH):
        column_K = first_K + start + tl.arange(0, WIDTH)
        store_columns(
            load_tile(x_ptr, tokens_of(block, ROWS), column_K, tokens, columns, x_stride),
            block,
            column_K,
            columns_ptr,
            columns_scale_ptr,
            columns,
            columns_stride,
            columns_scale_stride,
            ROWS,
            POWER_OF_TWO,
        )


def side_by_side(x_TK: Tensor) -> Tensor:
    """x with the values of a row side by side; a copy only when it has to be one."""
    return x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()


def rows_at_once(x_TK: Tensor, width: int, warps: int) -> int:
    """How many rows of a tile so many warps load at once, with 16 bytes for each thread."""
    return max(1, warps * 32 * 16 // (width * x_TK.element_size()))


def _launch_rows(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    x_TK = side_by_side(x_TK)
    tokens, columns = x_TK.shape
    values_TK, scale_TV = empty_rows(tokens, columns, x_TK.device)
    if x_TK.numel():
        _rows_kernel[(triton.cdiv(tokens, ROWS_TOKENS) * triton.cdiv(columns, ROWS_BLOCKS * BLOCK),)](
            x_TK,
            values_TK,
            scale_TV,
            tokens,
            columns,
            x_TK.stride(0),
            values_TK.stride(0),
            scale_TV.stride(1),
            POWER_OF_TWO=power_of_two_scales,
            TOKENS=ROWS_TOKENS,
            BLOCKS=ROWS_BLOCKS,
            num_warps=ROWS_WARPS,
        )
    return values_TK, scale_TV


_rows = torch.library.custom_op("deepwright::quantise_fp8_rows", _launch_rows, mutates_args=())


@_rows.register_fake
def _(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    return empty_rows(x_TK.shape[0], x_TK.shape[1], x_TK.device)


def _along_columns(
    x_TK: Tensor, rows: tuple[Tensor, Tensor] | None, columns: tuple[Tensor, Tensor], power_of_two_scales: bool
) -> None:
    """Fill `columns`, and `rows` as well if they are there."""
    x_TK = side_by_side(x_TK)
    if not x_TK.numel():
        return
    tokens, width = x_TK.shape
    values_TK, scale_TV = rows or columns
    values_KT, scale_KU = columns
    piece, warps = (BOTH_WIDTH, BOTH_WARPS) if rows else (COLUMNS_WIDTH, COLUMNS_WARPS)
    _columns_kernel[(blocks(tokens) * triton.cdiv(width, BLOCK if rows else piece),)](
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
        BOTH=rows is not None,
        POWER_OF_TWO=power_of_two_scales,
        TOKENS=BOTH_TOKENS,
        WIDTH=piece,
        ROWS=rows_at_once(x_TK, piece, warps),
        num_warps=warps,
    )


def _launch_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    columns = empty_rows(x_TK.shape[1], x_TK.shape[0], x_TK.device)
    _along_columns(x_TK, None, columns, power_of_two_scales)
    return columns


_columns = torch.library.custom_op("deepwright::quantise_fp8_columns", _launch_columns, mutates_args=())


@_columns.register_fake
def _(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    return empty_rows(x_TK.shape[1], x_TK.shape[0], x_TK.device)


def _launch_rows_and_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x_TK.shape
    rows, columns = empty_rows(tokens, width, x_TK.device), empty_rows(width, tokens, x_TK.device)
    _along_columns(x_TK, rows, columns, power_of_two_scales)
    return *rows, *columns


_rows_and_columns = torch.library.custom_op(
    "deepwright::quantise_fp8_rows_and_columns", _launch_rows_and_columns, mutates_args=()
)


@_rows_and_columns.register_fake
def _(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x_TK.shape
    return *empty_rows(tokens, width, x_TK.device), *empty_rows(width, tokens, x_TK.device)


def quantise_fp8_rows(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [T, K] and scales [T, V]."""
    # Outside of a traced graph torch's dispatch would take the host longer than many a kernel runs.
    return (_rows if torch.compiler.is_compiling() else _launch_rows)(x_TK, power_of_two_scales)


def quantise_fp8_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    """Values [K, T] and scales [K, U]."""
    return (_columns if torch.compiler.is_compiling() else _launch_columns)(x_TK, power_of_two_scales)


def quantise_fp8_rows_and_columns(x_TK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both, rows first."""
    return (_rows_and_columns if torch.compiler.is_compiling() else _launch_rows_and_columns)(x_TK, power_of_two_scales)
