"""The three block-scaled products against float64 products of what their operands stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_kernels import (
    fp8_grouped_matmul,
    fp8_grouped_outer,
    fp8_matmul,
    quantise_fp8_blocks,
    quantise_fp8_columns,
    quantise_fp8_rows,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def meant(values: Tensor, scales: Tensor) -> Tensor:
    """What values and scales stand for, in float64."""
    columns = scales.double().repeat_interleave(128, -1)[..., : values.shape[-1]]
    if scales.shape[-2] != values.shape[-2]:
        columns = columns.repeat_interleave(128, -2)[..., : values.shape[-2], :]
    return values.double() * columns


def off(have: Tensor, want: Tensor) -> float:
    return float((have.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantise_b", [quantise_fp8_blocks, quantise_fp8_rows])
@pytest.mark.parametrize("shape", [(1, 16, 16), (130, 576, 300), (5, 128, 257)])
def test_product(shape: tuple[int, int, int], quantise_b: Callable[..., Any], dtype: torch.dtype) -> None:
    rows, outputs, inner = shape
    inner = -(-inner // 16) * 16
    x, weight = draw(rows, inner), draw(outputs, inner)
    a, b = quantise_fp8_rows(x), quantise_b(weight)
    have = fp8_matmul(*a, *b, dtype)
    assert have.dtype == dtype and have.shape == (rows, outputs)
    assert off(have, meant(*a) @ meant(*b).T) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert off(have, x.double() @ weight.double().T) < 0.06


def test_the_default_is_bfloat16_and_no_tokens_are_no_problem() -> None:
    b = quantise_fp8_blocks(draw(32, 48))
    assert fp8_matmul(*quantise_fp8_rows(draw(0, 48)), *b).shape == (0, 32)
    columns = quantise_fp8_columns(draw(0, 48))
    have = fp8_matmul(*columns, *columns)
    assert have.dtype == torch.bfloat16 and torch.equal(have, torch.zeros_like(have)) and have.shape == (48, 48)


@pytest.mark.parametrize("ends", [[128, 128, 384], [0, 0, 0], [0, 400 // 128 * 128, 384], [256, 256, 256]])
def test_grouped_products(ends: list[int]) -> None:
    tokens, inputs, outputs = 400, 48, 144
    x, weight, grad = draw(tokens, inputs), draw(3, outputs, inputs), draw(tokens, outputs)
    a, b, ends_E = quantise_fp8_rows(x), quantise_fp8_blocks(weight), torch.tensor(ends, dtype=torch.int32)
    have = fp8_grouped_matmul(*a, *b, ends_E, torch.float32)
    grad_columns, x_columns = quantise_fp8_columns(grad), quantise_fp8_columns(x)
    outer = fp8_grouped_outer(*grad_columns, *x_columns, ends_E)
    assert outer.dtype == torch.float32 and outer.shape == (3, outputs, inputs)
    starts = [0, *ends[:-1]]
    for group, rows in enumerate(slice(start, end) for start, end in zip(starts, ends, strict=True)):
        want = meant(*a)[rows] @ meant(*b)[group].T
        torch.testing.assert_close(have[rows].double(), want, rtol=1e-5, atol=1e-4)
        want = meant(*grad_columns)[:, rows] @ meant(*x_columns)[:, rows].T
        torch.testing.assert_close(outer[group].double(), want, rtol=1e-5, atol=1e-3)
    assert torch.equal(have[ends[-1] :], torch.zeros(tokens - ends[-1], outputs))


def test_huge_values_are_scaled_and_what_is_not_finite_is_seen() -> None:
    x, weight = draw(4, 256), draw(32, 256)
    huge = x * 1e30
    have = fp8_matmul(*quantise_fp8_rows(huge), *quantise_fp8_blocks(weight), torch.float32)
    want = fp8_matmul(*quantise_fp8_rows(x), *quantise_fp8_blocks(weight), torch.float32)
    torch.testing.assert_close(have * 1e-30, want, rtol=1e-4, atol=1e-4)
    for value in (math.nan, math.inf):
        x[1, 200] = value
        lost = fp8_matmul(*quantise_fp8_rows(x), *quantise_fp8_blocks(weight)).isnan()
        assert lost[1].all() and not lost[[0, 2, 3]].any()


def test_errors_name_the_argument() -> None:
    (a, a_scale), (b, b_scale) = quantise_fp8_rows(draw(6, 48)), quantise_fp8_blocks(draw(32, 48))
    stack, stack_scale = quantise_fp8_blocks(draw(2, 32, 48))
    ends = torch.tensor([0, 0], dtype=torch.int32)
    padded = torch.zeros(6, 56, dtype=torch.float8_e4m3fn)[:, :48]
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "fp8_matmul: a_MK is float32", lambda: fp8_matmul(a.float(), a_scale, b, b_scale)),
        (
            ValueError,
            "a_MK of the shape .* expected values side by side",
            lambda: fp8_matmul(padded, a_scale, b, b_scale),
        ),
        (ValueError, r"b_NK has shape \[32, 32\]", lambda: fp8_matmul(a, a_scale, b[:, :32], b_scale)),
        (ValueError, r"a_scale_MV has shape \[5, 1\]", lambda: fp8_matmul(a, a_scale[:5], b, b_scale)),
        (TypeError, "a_scale_MV is float64", lambda: fp8_matmul(a, a_scale.double(), b, b_scale)),
        (
            ValueError,
            r"b_scale has shape \[2, 1\]; expected block scales",
            lambda: fp8_matmul(a, a_scale, b, b_scale.expand(2, 1)),
        ),
        (ValueError, "b_scale is on meta", lambda: fp8_matmul(a, a_scale, b, b_scale.to("meta"))),
        (TypeError, "dtype is torch.float16; expected", lambda: fp8_matmul(a, a_scale, b, b_scale, torch.float16)),
        (
            ValueError,
            r"b_scale_EUV has shape \[1, 1\]; expected .* = \[2, 1, 1\]",
            lambda: fp8_grouped_matmul(a, a_scale, stack, b_scale, ends),
        ),
        (TypeError, "ends_E is int64", lambda: fp8_grouped_matmul(a, a_scale, stack, stack_scale, ends.long())),
        (ValueError, r"ends_E has shape \[1\]", lambda: fp8_grouped_matmul(a, a_scale, stack, stack_scale, ends[:1])),
        (ValueError, r"b_NT has shape \[32, 32\]", lambda: fp8_grouped_outer(a, a_scale, b[:, :32], b_scale, ends)),
    ]
    for error, words, call in wrong:
        with pytest.raises(error, match=words):
            call()
    side_by_side = quantise_fp8_rows(draw(6, 200))
    with pytest.raises(ValueError, match=r"a_scale_MV has the strides \[2, 1\]; expected row scales that lie token by"):
        weight = quantise_fp8_blocks(draw(32, 208)[:, :200])
        values = torch.zeros(32, 208, dtype=torch.float8_e4m3fn)[:, :200]
        fp8_matmul(side_by_side[0], side_by_side[1].contiguous(), values, weight[1])
