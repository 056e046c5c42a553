"""The CUDA kernel of the block-scaled FP8 products: every edge of a tile, every way that tokens can fall into groups.

Compared with a product in float64 of the values times their scales. Within 128 of K the tensor cores add with about 14
bits, which the tolerance allows for; a tile, a scale or a group that is mistaken for another is far outside it.
"""

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from deepwright_kernels import backend_for, configure, fp8_grouped_matmul, fp8_grouped_outer, fp8_matmul
from deepwright_kernels.fp8_layout import blocks, empty_row_scales, empty_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU; there is none here",
    ),
]
DEVICE = torch.device("cuda", 0)
HOPPER = {name: "cuda" for name in ("fp8_matmul", "fp8_grouped_matmul", "fp8_grouped_outer")}


def values(rows: int, columns: int) -> Tensor:
    return empty_values(rows, columns, DEVICE).copy_(torch.randn(rows, columns, device=DEVICE))


def row_scales(rows: int, columns: int) -> Tensor:
    return empty_row_scales(rows, columns, DEVICE).copy_(torch.rand(rows, blocks(columns), device=DEVICE) + 0.5)


def block_scales(*shape: int) -> Tensor:
    return torch.rand(*shape[:-2], blocks(shape[-2]), blocks(shape[-1]), device=DEVICE) + 0.5


def exact(x: Tensor, scale: Tensor) -> Tensor:
    """The values times their scales, of rows or of blocks, in float64."""
    rows, columns = x.shape
    scale = scale if len(scale) == rows else scale.repeat_interleave(128, 0)[:rows]
    return x.double() * scale.double().repeat_interleave(128, 1)[:, :columns]


def ends_of(sizes: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device=DEVICE)


def assert_near(have: Tensor, want: Tensor) -> None:
    assert have.isfinite().all()
    tolerance = 4e-3 if have.dtype == torch.bfloat16 else 1e-3
    assert (have.double() - want).norm() <= tolerance * want.norm()
    # No single value is far off: errors that a norm over millions would hide.
    assert (have.double() - want).abs().max() <= 0.03 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", ["blocks", "rows"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 8, 16), (1, 128, 128), (127, 136, 1), (128, 256, 384), (129, 264, 400), (1000, 2120, 1557), (4096, 576, 7168)],
)
def test_dense_product(m: int, n: int, k: int, scales: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = values(m, k), values(n, k)
    a_scale = row_scales(m, k)
    b_scale = row_scales(n, k) if scales == "rows" else block_scales(n, k)
    with configure(HOPPER):
        have = fp8_matmul(a, a_scale, b, b_scale, dtype)
    assert have.shape == (m, n) and have.dtype == dtype
    assert_near(have, exact(a, a_scale) @ exact(b, b_scale).T)


SIZES = [
    [128],
    [0, 0, 1024, 0],
    [128, 256, 0, 384, 128],
    [0] * 7 + [128] * 40 + [0] * 5 + [1280] + [0] * 11,  # more groups than a warp has threads
    [384] * 64,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(264, 400), (1408, 2048)])
@pytest.mark.parametrize("beyond", [0, 320])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_product_for_groups_of_rows(sizes: list[int], beyond: int, n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, groups = sum(sizes) + beyond, len(sizes)
    a, a_scale = values(tokens, k), row_scales(tokens, k)
    b = values(groups * n, k).view(groups, n, k)
    b_scale = block_scales(groups, n, k)
    with configure(HOPPER):
        have = fp8_grouped_matmul(a, a_scale, b, b_scale, ends_of(sizes), dtype)
    rows = exact(a, a_scale)[: sum(sizes)].split(sizes)
    want = torch.cat([rows[e] @ exact(b[e], b_scale[e]).T for e in range(groups)])
    assert_near(have[: sum(sizes)], want)
    assert have[sum(sizes) :].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n"), [(300, 264), (1408, 512)])
@pytest.mark.parametrize("beyond", [0, 320])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_product_over_the_tokens_of_groups(sizes: list[int], beyond: int, m: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = sum(sizes) + beyond
    a, a_scale = values(m, tokens), row_scales(m, tokens)
    b, b_scale = values(n, tokens), row_scales(n, tokens)
    with configure(HOPPER):
        have = fp8_grouped_outer(a, a_scale, b, b_scale, ends_of(sizes), dtype)
    a_parts, b_parts = (exact(x, s)[:, : sum(sizes)].split(sizes, 1) for x, s in ((a, a_scale), (b, b_scale)))
    want = torch.stack([left @ right.T for left, right in zip(a_parts, b_parts, strict=True)])
    assert have.shape == (len(sizes), m, n)
    assert_near(have, want)
    for group, size in enumerate(sizes):
        if size == 0:
            assert have[group].eq(0).all()


def test_no_tokens_at_all() -> None:
    a, b = values(0, 256), values(2 * 128, 256).view(2, 128, 256)
    with configure(HOPPER):
        assert fp8_grouped_matmul(a, row_scales(0, 256), b, block_scales(2, 128, 256), ends_of([0, 0])).shape == (
            0,
            128,
        )
        have = fp8_grouped_outer(values(64, 0), row_scales(64, 0), values(32, 0), row_scales(32, 0), ends_of([0, 0]))
        assert have.shape == (2, 64, 32) and have.eq(0).all()
        assert fp8_matmul(a, row_scales(0, 256), b[0], block_scales(128, 256)).shape == (0, 128)


def test_scales_that_begin_anywhere() -> None:
    torch.manual_seed(0)
    a, a_scale, b, b_scale = values(300, 256), row_scales(300, 256), values(128, 256), block_scales(128, 256)
    with configure(HOPPER):
        have = fp8_matmul(a[3:], a_scale[3:], b, b_scale)
    assert_near(have, exact(a[3:], a_scale[3:]) @ exact(b, b_scale).T)


def test_the_same_bits_each_time_also_from_a_graph_with_other_groups() -> None:
    torch.manual_seed(0)
    n, k, tokens = 1408, 2048, 4096
    a, a_scale = values(tokens, k), row_scales(tokens, k)
    b, b_scale = values(8 * n, k).view(8, n, k), block_scales(8, n, k)
    even, uneven = ends_of([512] * 8), ends_of([0, 2048, 128, 0, 640, 0, 384, 0])
    with configure(HOPPER):
        first, other = (fp8_grouped_matmul(a, a_scale, b, b_scale, ends) for ends in (even, uneven))
        assert all(torch.equal(fp8_grouped_matmul(a, a_scale, b, b_scale, even), first) for _ in range(20))
        ends = even.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fp8_grouped_matmul(a, a_scale, b, b_scale, ends)
        graph.replay()
        assert torch.equal(captured, first)
        ends.copy_(uneven)
        graph.replay()
        assert torch.equal(captured, other)


def test_under_torch_compile() -> None:
    torch.manual_seed(0)
    a, a_scale, b, b_scale = values(256, 512), row_scales(256, 512), values(384, 512), block_scales(384, 512)
    with configure(HOPPER):
        compiled = torch.compile(lambda *operands: fp8_matmul(*operands) * 2, fullgraph=True)
        assert torch.equal(compiled(a, a_scale, b, b_scale), fp8_matmul(a, a_scale, b, b_scale) * 2)


def test_output_rows_of_odd_length_are_refused_with_the_reason() -> None:
    a, a_scale, b, b_scale = values(16, 128), row_scales(16, 128), values(20, 128), block_scales(20, 128)
    with configure(HOPPER):
        with pytest.raises(ValueError, match="it writes 8 values at a time and rows of the output have 20"):
            fp8_matmul(a, a_scale, b, b_scale)
        assert backend_for("fp8_matmul", a, a_scale, b, b_scale, torch.float32) == "cuda"
