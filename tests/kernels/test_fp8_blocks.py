"""Block-scaled FP8 against loops over blocks and values, which know e4m3 from its definition and not from torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dequantise_fp8_blocks, quantise_fp8_blocks

E4M3_MAX, SMALLEST_AMAX = 448.0, 1e-4
# Full and partial blocks, one row, one column, DeepSeek-V3's 576 rows, and nothing at all.
SHAPES = [(128, 128), (256, 384), (576, 192), (130, 1), (1, 300), (5, 7), (0, 4), (4, 0)]


# All finite values that are not negative: 4 bits of exponent with bias 7, 3 of mantissa; 1111.111 is no number.
GRID = [math.ldexp(1 + m / 8, e - 7) if e else math.ldexp(m / 8, -6) for e in range(16) for m in range(8)][:-1]


def rounded(x: float) -> float:
    """The nearest value of the grid; of two equally near ones the one with an even last bit."""
    place = bisect_left(GRID, abs(x))
    if place == len(GRID):
        return math.copysign(GRID[-1], x)
    if place and (middle := (GRID[place - 1] + GRID[place]) / 2) >= abs(x):
        place -= abs(x) < middle or place % 2
    return math.copysign(GRID[place], x)


def blocks_of(shape: Sequence[int], block: tuple[int, int]) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Each block's place in the grid of scales, and in the matrix."""
    for u in range(-(-shape[0] // block[0])):
        for v in range(-(-shape[1] // block[1])):
            rows, columns = slice(u * block[0], (u + 1) * block[0]), slice(v * block[1], (v + 1) * block[1])
            yield (u, v), (rows, columns)


def by_blocks(x: Tensor, block: tuple[int, int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values on the grid and the scale of each block, block by block."""
    values = torch.zeros(x.shape)
    scales = torch.zeros([-(-size // each) for size, each in zip(x.shape, block, strict=True)])
    for place, part in blocks_of(x.shape, block):
        scale = x[part].abs().max().clamp(min=SMALLEST_AMAX) / E4M3_MAX
        if power_of_two:
            scale = torch.tensor(2.0 ** math.ceil(math.log2(float(scale))))
        scales[place] = scale
        scaled = x[part] * (1 / scale)
        values[part] = torch.tensor([[rounded(each) for each in row] for row in scaled.tolist()])
    return values, scales


def random_matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Values whose blocks differ in size by orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * 10 ** torch.randn(shape[0], 1, generator=draw)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["amax / 448", "power of two"])
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_blocks(shape: tuple[int, int], power_of_two: bool) -> None:
    x = random_matrix(shape)
    values, scales = quantise_fp8_blocks(x, power_of_two_scales=power_of_two)
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous() and scales.dtype == torch.float32
    want_values, want_scales = by_blocks(x, (128, 128), power_of_two)
    assert torch.equal(scales, want_scales)
    assert torch.equal(values.float(), want_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_back_again_each_value_is_multiplied_by_the_scale_of_its_block(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = random_matrix(shape).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=torch.Generator().manual_seed(1)) + 0.1
    have = dequantise_fp8_blocks(values, scales, dtype=dtype)
    want = torch.empty(shape)
    for place, part in blocks_of(shape, (128, 128)):
        want[part] = values[part].float() * scales[place]
    assert have.dtype == dtype and torch.equal(have, want.to(dtype))


def test_the_default_is_bfloat16() -> None:
    assert dequantise_fp8_blocks(*quantise_fp8_blocks(torch.ones(2, 2))).dtype == torch.bfloat16


@pytest.mark.parametrize(("block", "grid"), [((4, 2), (3, 4)), ((1, 3), (9, 3)), ((100, 100), (1, 1))])
def test_blocks_of_other_sizes(block: tuple[int, int], grid: tuple[int, int]) -> None:
    x = random_matrix((9, 7))
    values, scales = quantise_fp8_blocks(x, block)
    want_values, want_scales = by_blocks(x, block, False)
    assert scales.shape == grid and torch.equal(scales, want_scales)
    back = dequantise_fp8_blocks(values, scales, block, torch.float32)
    for row in range(9):
        for column in range(7):
            scale = want_scales[row // block[0], column // block[1]]
            assert back[row, column] == want_values[row, column] * scale


def test_every_value_of_the_format_survives() -> None:
    """Both signs of zero, subnormal values, and the largest: 448 in the block makes the scale exactly 1."""
    grid = torch.tensor(GRID)
    x = torch.cat([grid, -grid])[None]
    values, scales = quantise_fp8_blocks(x, (1, 254))
    assert scales.tolist() == [[1.0]]
    assert torch.equal(values.float(), x)
    assert torch.equal(values.float().signbit(), x.signbit())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_on_the_grid_comes_back_exactly(power_of_two: bool) -> None:
    """Once quantised, a matrix is quantised again without loss, scales included: 448 stands in every block already."""
    values, scales = quantise_fp8_blocks(random_matrix((200, 300)), power_of_two_scales=power_of_two)
    x = dequantise_fp8_blocks(values, scales, dtype=torch.float32)
    again, same_scales = quantise_fp8_blocks(x, power_of_two_scales=power_of_two)
    assert torch.equal(dequantise_fp8_blocks(again, same_scales, dtype=torch.float32), x)
    if not power_of_two:
        assert torch.equal(again.float(), values.float()) and torch.equal(same_scales, scales)


def test_the_error_is_that_of_three_bits_of_mantissa() -> None:
    """At most a sixteenth of a value, or, below the smallest normal one, half a step of the subnormal values."""
    x = random_matrix((256, 256))
    for power_of_two in (False, True):
        values, scales = quantise_fp8_blocks(x, power_of_two_scales=power_of_two)
        back = dequantise_fp8_blocks(values, scales, dtype=torch.float32)
        steps = scales.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2.0**-9
        assert ((back - x).abs() <= torch.maximum(x.abs() / 16, steps / 2) * 1.0001).all()


def test_zeros_and_tiny_values_have_the_scale_of_a_ten_thousandth() -> None:
    """Without the clamp a block of zeros would be divided by zero, and one of 1e-40 would overflow."""
    x = torch.zeros(3 * 128, 128)
    x[128:256] = 1e-40
    x[256:] = 5e-5
    values, scales = quantise_fp8_blocks(x)
    assert torch.equal(scales, torch.full((3, 1), SMALLEST_AMAX) / E4M3_MAX)
    assert torch.equal(values[:256].float(), torch.zeros(256, 128))
    assert torch.equal(values[256:].float(), torch.full((128, 128), 224.0))
    assert torch.equal(dequantise_fp8_blocks(values, scales)[:128], torch.zeros(128, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("largest", [1e30, 3e38])
def test_huge_values_do_not_overflow(largest: float) -> None:
    x = torch.tensor([[largest, -largest, largest / 2, 1.0]])
    for power_of_two in (False, True):
        values, scales = quantise_fp8_blocks(x, power_of_two_scales=power_of_two)
        assert values.float().isfinite().all() and scales.isfinite().all()
        torch.testing.assert_close(dequantise_fp8_blocks(values, scales, dtype=torch.float32), x, rtol=1 / 16, atol=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_afterwards(value: float) -> None:
    x = torch.ones(2, 4)
    x[1, 2] = value
    assert quantise_fp8_blocks(x)[0].float().isnan().any()


def test_power_of_two_scales_are_the_next_above_and_never_below() -> None:
    """A scale below amax / 448 would cut the largest values off. An exact power of two stays; one bit more is doubled.

    log2 in float32 rounds 1 + 2^-23 to 0, so its ceiling would be too small.
    """
    exact = torch.tensor([2.0**e for e in (-18, -3, 0, 9)])
    above = torch.nextafter(exact, torch.tensor(math.inf))
    below = torch.nextafter(exact, torch.tensor(0.0))
    for scales, want in ((exact, exact), (above, 2 * exact), (below, exact)):
        x = (scales * E4M3_MAX)[:, None]
        have = quantise_fp8_blocks(x, (1, 1), power_of_two_scales=True)[1][:, 0]
        kept = x[:, 0] / E4M3_MAX == scales  # the division may have rounded
        assert kept.any() and torch.equal(have[kept], want[kept])
    x = random_matrix((1000, 1))
    values, scales = quantise_fp8_blocks(x, (1, 1), power_of_two_scales=True)
    amax = x.abs().clamp(min=SMALLEST_AMAX)
    assert (scales.log2() % 1 == 0).all()
    assert (scales >= amax / E4M3_MAX).all() and (scales < 2 * amax / E4M3_MAX * 1.000001).all()
    assert torch.equal(values.float() * scales, (x / scales).to(torch.float8_e4m3fn).float() * scales)


def test_scales_may_lie_in_a_byte_each() -> None:
    values, scales = quantise_fp8_blocks(random_matrix((130, 200)), power_of_two_scales=True)
    bytes_ = scales.to(torch.float8_e8m0fnu)
    assert torch.equal(bytes_.float(), scales)
    assert torch.equal(dequantise_fp8_blocks(values, bytes_), dequantise_fp8_blocks(values, scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_input_is_scaled_in_float32(dtype: torch.dtype) -> None:
    x = random_matrix((140, 150)).clamp(-1e4, 1e4).to(dtype)
    for have, want in zip(quantise_fp8_blocks(x), quantise_fp8_blocks(x.float()), strict=True):
        assert torch.equal(have.float(), want.float())


def test_strides_do_not_matter() -> None:
    x = random_matrix((150, 140))
    for have, want in zip(quantise_fp8_blocks(x.T), quantise_fp8_blocks(x.T.contiguous()), strict=True):
        assert torch.equal(have.float(), want.float())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_stack_is_quantised_matrix_by_matrix_and_so_are_transposes(power_of_two: bool) -> None:
    x = torch.stack([random_matrix((140, 300), seed) for seed in range(3)])
    values, scales = quantise_fp8_blocks(x, power_of_two_scales=power_of_two)
    for matrix, *have in zip(x, values, scales, strict=True):
        want = quantise_fp8_blocks(matrix, power_of_two_scales=power_of_two)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(have, want, strict=True))
    for stack in (x, x[0]):
        straight = quantise_fp8_blocks(stack, power_of_two_scales=power_of_two)
        across = quantise_fp8_blocks(stack, power_of_two_scales=power_of_two, transposed=True)
        for a, b in zip(across, straight, strict=True):
            assert a.is_contiguous() and torch.equal(a.float(), b.float().mT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_power_of_two_scales_of_what_is_not_finite_are_not_finite(value: float) -> None:
    values, scales = quantise_fp8_blocks(torch.tensor([[1.0, value]]), power_of_two_scales=True)
    assert not scales.isfinite().any() and values.float().isnan().any()


def test_errors_name_the_argument() -> None:
    values, scales = quantise_fp8_blocks(torch.ones(200, 100))
    wrong: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"x_NK has shape \[3\]; expected \[N, K\] or a stack", lambda: quantise_fp8_blocks(torch.ones(3))),
        (TypeError, "x_NK is int64", lambda: quantise_fp8_blocks(torch.ones(2, 2, dtype=torch.int64))),
        (ValueError, r"block is \(0, 128\); expected", lambda: quantise_fp8_blocks(torch.ones(2, 2), (0, 128))),
        (ValueError, r"block is \(128,\); expected", lambda: quantise_fp8_blocks(torch.ones(2, 2), (128,))),  # type: ignore[arg-type]
        (TypeError, "values_NK is float32", lambda: dequantise_fp8_blocks(torch.ones(200, 100), scales)),
        (ValueError, r"values_NK has shape \[200\]", lambda: dequantise_fp8_blocks(values[:, 0], scales)),
        (ValueError, r"scale_UV has shape \[1, 1\]", lambda: dequantise_fp8_blocks(values, scales[:1])),
        (TypeError, "scale_UV is float64", lambda: dequantise_fp8_blocks(values, scales.double())),
        (ValueError, "scale_UV is on meta", lambda: dequantise_fp8_blocks(values, scales.to("meta"))),
    ]
    for error, words, call in wrong:
        with pytest.raises(error, match=words):
            call()
