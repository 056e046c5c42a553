"""Activations in FP8 against their definition, block by block; how values and scales lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepwright_kernels import quantise_fp8_columns, quantise_fp8_rows, quantise_fp8_rows_and_columns

SHAPES = [(1, 128), (5, 300), (130, 16), (3, 576), (129, 7), (0, 32), (4, 0)]


def activations(tokens: int, columns: int) -> Tensor:
    """Rows that differ in size by orders of magnitude."""
    draw = torch.Generator().manual_seed(tokens + columns)
    return torch.randn(tokens, columns, generator=draw) * 10 ** torch.randn(tokens, 1, generator=draw)


def by_blocks(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values and scales of 128 values of a row at a time."""
    values, scales = torch.zeros(x.shape), torch.zeros(x.shape[0], -(-x.shape[1] // 128))
    for row in range(x.shape[0]):
        for v in range(scales.shape[1]):
            part = x[row, 128 * v : 128 * (v + 1)].float()
            scale = part.abs().max().clamp(min=1e-4) / 448
            if power_of_two:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(float(scale))))
            values[row, 128 * v : 128 * (v + 1)] = (part * (1 / scale)).to(torch.float8_e4m3fn).float()
            scales[row, v] = scale
    return values, scales


@pytest.mark.parametrize("power_of_two", [False, True], ids=["amax / 448", "power of two"])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_blocks_of_rows_and_of_columns(shape: tuple[int, int], power_of_two: bool) -> None:
    x = activations(*shape)
    both = quantise_fp8_rows_and_columns(x, power_of_two)
    for have, part, of in (
        (quantise_fp8_rows(x, power_of_two), both[:2], x),
        (quantise_fp8_columns(x, power_of_two), both[2:], x.T),
    ):
        want_values, want_scales = by_blocks(of, power_of_two)
        for values, scales in (have, part):
            assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
            assert torch.equal(values.float(), want_values)
            assert torch.equal(scales, want_scales)


@pytest.mark.parametrize("tokens", [1, 5, 128, 130])
def test_values_lie_in_rows_of_16_bytes_and_scales_token_by_token(tokens: int) -> None:
    values, scales = quantise_fp8_rows(torch.ones(tokens, 300))
    assert values.stride() == (304, 1) and scales.stride() == (1, -(-tokens // 4) * 4)
    values, scales = quantise_fp8_columns(torch.ones(tokens, 300))
    assert values.stride() == (-(-tokens // 16) * 16, 1) and scales.stride() == (1, 300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_scaled_in_float32(dtype: torch.dtype) -> None:
    x = activations(9, 200).clamp(-1e4, 1e4).to(dtype)
    for have, want in zip(quantise_fp8_rows(x), quantise_fp8_rows(x.float()), strict=True):
        assert torch.equal(have.float(), want.float())


@pytest.mark.parametrize("quantise", [quantise_fp8_rows, quantise_fp8_columns])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_in_its_block(
    quantise: Callable[[Tensor, bool], tuple[Tensor, Tensor]], power_of_two: bool, value: float
) -> None:
    x = torch.ones(256, 256)
    x[3, 200] = value
    values, scales = quantise(x, power_of_two)
    back = values.float() * scales.repeat_interleave(128, 1)
    lost = back.isnan()
    assert lost[3, 200] if quantise is quantise_fp8_rows else lost[200, 3]
    assert int(lost.sum()) <= 128 and (~scales.isfinite()).sum() == 1


def test_zeros_tiny_and_huge_values() -> None:
    x = torch.zeros(3, 256)
    x[1], x[2, :4] = 1e-40, torch.tensor([3e38, -3e38, 1.0, 0.0])
    for power_of_two in (False, True):
        values, scales = quantise_fp8_rows(x, power_of_two)
        assert scales.isfinite().all() and values.float().isfinite().all()
        assert (values[:2].float() == 0).all() and (scales[:2] == scales[0, 0]).all()
        back = values.float() * scales.repeat_interleave(128, 1)
        torch.testing.assert_close(back[2, :2], x[2, :2], rtol=1 / 16, atol=0)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"quantise_fp8_rows: x_TK has shape \[3\]; expected \[T, K\]"):
        quantise_fp8_rows(torch.ones(3))
    with pytest.raises(TypeError, match="quantise_fp8_columns: x_TK is int64"):
        quantise_fp8_columns(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="quantise_fp8_rows_and_columns: x_TK has shape"):
        quantise_fp8_rows_and_columns(torch.ones(2, 2, 2))
