"""Which tiles the CUDA kernel of the FP8 products takes: a question of sizes alone, asked on any machine."""

import pytest

from deepwright_kernels.fp8_matmul.hopper import _waves


@pytest.mark.parametrize(
    ("rows", "columns", "matrices", "along", "waves"),
    [
        (4096, 4096, 1, 56, 2),  # 512 wide tiles are nearly four turns of 132 processors
        (4096, 2112, 1, 56, 1),  # 288 wide tiles would be three turns, the last for 24 of them
        (64, 7168, 1, 56, 1),  # few tiles: narrow ones occupy twice as many processors
        (2816, 2048, 64, 3, 2),
    ],
)
def test_the_tiles_that_are_done_first_are_taken(
    rows: int, columns: int, matrices: int, along: int, waves: int
) -> None:
    assert _waves(rows, columns, matrices, along, 132) == waves
