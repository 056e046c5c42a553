"""Triton kernels against their references. `test_interpreter.py` runs these in triton's interpreter on the CPU, and
`tests/gpu/test_kernels.py` compiled on a GPU: both in a process of their own, because triton decides at import."""

import os

import pytest
import torch
from torch import Tensor

from deepwright_kernels import backend_for, configure, dispatch, mla_paged_decode, rms_norm, rotary

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
    torch.float16: {"rtol": 0.005, "atol": 0.005},
}


@pytest.fixture(autouse=True)
def _triton():
    torch.manual_seed(0)
    with configure({"*": "triton"}):
        assert backend_for("rms_norm", torch.zeros(1, device=DEVICE)) == "triton"
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def both(name: str, arguments: tuple, leaves: tuple[Tensor, ...], upstream: Tensor) -> list[tuple[Tensor, ...]]:
    """(output, gradients) of the reference and of the kernel."""
    results = []
    for backend in ("reference", "triton"):
        output = dispatch.load(name, backend)(*arguments)
        results.append((output, *torch.autograd.grad(output, leaves, upstream)))
    return results


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 129), (9, 64), (0, 8)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(*shape, dtype=dtype, grad=True), draw(shape[-1], grad=True)
    want, have = both("rms_norm", (x, weight, 1e-5), (x, weight), draw(*shape, dtype=dtype))
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


def test_rms_norm_of_a_slice_with_huge_values() -> None:
    wide = draw(6, 40) * 1e18
    x, weight = wide[:, 3:20], draw(17)
    torch.testing.assert_close(rms_norm(x, weight, 0.0), dispatch.load("rms_norm", "reference")(x, weight, 0.0))


def test_rms_norm_gradients_are_the_same_every_time() -> None:
    x, weight, upstream = draw(33, 20, grad=True), draw(20, grad=True), draw(33, 20)
    runs = [torch.autograd.grad(rms_norm(x, weight), (x, weight), upstream) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("x_shape", "angle_shape"),
    [
        ((6,), (3,)),
        ((5, 8), (5, 4)),
        ((2, 3, 4, 12), (3, 1, 6)),
        ((2, 3, 4, 64), (2, 3, 1, 32)),
        ((2, 2, 3, 2, 2), (3, 1, 1)),
        ((0, 4), (2,)),
    ],
)
def test_rotary(x_shape: tuple[int, ...], angle_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, angle = draw(*x_shape, dtype=dtype, grad=True), draw(*angle_shape)
    want, have = both("rotary", (x, angle.cos(), angle.sin()), (x,), draw(*x_shape, dtype=dtype))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


def test_rotary_of_a_slice_and_with_angles_that_lie_differently() -> None:
    x = draw(2, 5, 3, 20)[..., 6:14]
    cos, sin = draw(5, 4)[:, None], draw(4, 5).T[:, None]
    torch.testing.assert_close(rotary(x, cos, sin), dispatch.load("rotary", "reference")(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "latent", "rope", "block"),
    [
        ([1], 1, 1, 16, 16, 16),
        ([37, 5, 64], 1, 4, 32, 16, 16),
        ([9, 0, 3], 2, 3, 24, 6, 4),
        ([40, 33], 4, 20, 16, 8, 8),
    ],
)
def test_mla_paged_decode(
    lengths: list[int], queries: int, heads: int, latent: int, rope: int, block: int, dtype: torch.dtype
) -> None:
    batch, width = len(lengths), latent + rope
    lengths_B = torch.tensor(lengths, device=DEVICE)
    pages = max(1, -(-max(lengths) // block))
    blocks_BP = (torch.randperm(batch * pages, device=DEVICE) + 1).view(batch, pages)
    cache_NW = draw((batch * pages + 1) * block, width, dtype=dtype)
    # Everything beyond a length is NaN: one that is read shows.
    index_K = torch.arange(pages * block, device=DEVICE)
    slots_BK = blocks_BP[:, index_K // block] * block + index_K % block
    cache_NW[slots_BK[index_K >= lengths_B[:, None]]] = torch.nan
    cache_NW[:block] = torch.nan
    positions_BQ = (lengths_B[:, None] - queries + torch.arange(queries, device=DEVICE)).clamp(min=0)
    arguments = (
        draw(batch, queries, heads, latent, dtype=dtype),
        draw(batch, queries, heads, rope, dtype=dtype),
        cache_NW,
        blocks_BP,
        positions_BQ,
        lengths_B,
        block,
        width**-0.5,
    )
    out = mla_paged_decode(*arguments)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, dispatch.load("mla_paged_decode", "reference")(*arguments), **TOLERANCE[dtype])
    # int32 tables are as good as int64 ones
    narrow = [t.int() if isinstance(t, Tensor) and t.dtype == torch.int64 else t for t in arguments]
    assert torch.equal(out, mla_paged_decode(*narrow))


def test_operators_keep_torchs_rules() -> None:
    ops = torch.ops.deepwright
    x, weight = draw(4, 6, grad=True), draw(6, grad=True)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6), test_utils=OPCHECKS)
    torch.library.opcheck(ops.rotary.default, (x, draw(4, 3), draw(4, 3), False), test_utils=OPCHECKS)
    table = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(
        ops.mla_paged_decode.default,
        (draw(1, 1, 2, 16), draw(1, 1, 2, 16), draw(8, 32), table, table, table[0], 4, 0.1),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_compiled_graph_goes_through_whole() -> None:
    x, weight, angle = draw(4, 6, grad=True), draw(6, grad=True), draw(4, 3)

    def model(x: Tensor, weight: Tensor) -> Tensor:
        return rotary(rms_norm(x, weight), angle.cos(), angle.sin()).square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for have, want in zip(
        torch.autograd.grad(compiled(x, weight), (x, weight)),
        torch.autograd.grad(model(x, weight), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(have, want)
