"""Absorbed decode: kernel against reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dispatch, mla_paged_decode
from deepwright_kernels.mla_paged_decode.reference import pack_fp8_latents

from .sides import DEVICE, TOLERANCE, draw


def problem(
    lengths: list[int],
    queries: int,
    heads: int,
    latent: int,
    rope: int,
    block: int,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    size: float = 1.0,
    spare_pages: int = 0,
) -> dict[str, Any]:
    """Arguments of a call. Everything in the cache beyond a length is NaN: one that is read shows."""
    batch, width = len(lengths), latent + rope
    lengths_B = torch.tensor(lengths, device=DEVICE)
    pages = max(1, -(-max(lengths) // block)) + spare_pages
    blocks_BP = (torch.randperm(batch * pages, device=DEVICE) + 1).view(batch, pages)
    cache_NW = draw((batch * pages + 1) * block, width) * size
    cache_NW = pack_fp8_latents(cache_NW[:, :latent], cache_NW[:, latent:]) if fp8 else cache_NW.to(dtype)
    index_K = torch.arange(pages * block, device=DEVICE)
    slots_BK = blocks_BP[:, index_K // block] * block + index_K % block
    nan = 255 if fp8 else torch.nan
    cache_NW[slots_BK[index_K >= lengths_B[:, None]]] = nan
    cache_NW[:block] = nan
    return {
        "q_latent_BQHC": draw(batch, queries, heads, latent, dtype=dtype) * size,
        "q_rope_BQHR": draw(batch, queries, heads, rope, dtype=dtype) * size,
        "cache_NW": cache_NW,
        "blocks_BP": blocks_BP,
        "positions_BQ": (lengths_B[:, None] - queries + torch.arange(queries, device=DEVICE)).clamp(min=0),
        "lengths_B": lengths_B,
        "block_size": block,
        "scale": width**-0.5,
    }


def assert_equals_reference(arguments: dict[str, Any]) -> Tensor:
    out = mla_paged_decode(**arguments)
    # The reference rounds FP8 latents to bfloat16 once they have their scale; a kernel may keep more.
    fp8 = arguments["cache_NW"].dtype == torch.uint8
    assert torch.isfinite(out).all()
    want = dispatch.load("mla_paged_decode", "reference")(*arguments.values())
    torch.testing.assert_close(out, want, **TOLERANCE[torch.bfloat16 if fp8 else out.dtype])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "latent", "rope", "block"),
    [
        ([1], 1, 1, 16, 16, 16),
        ([37, 5, 64], 1, 4, 32, 16, 64),
        ([9, 0, 3], 2, 3, 24, 6, 4),
        ([40, 33], 3, 7, 16, 8, 8),
        ([70, 0], 2, 20, 16, 8, 64),
    ],
)
def test_mla_paged_decode(
    lengths: list[int], queries: int, heads: int, latent: int, rope: int, block: int, dtype: torch.dtype
) -> None:
    arguments = problem(lengths, queries, heads, latent, rope, block, dtype)
    out = assert_equals_reference(arguments)
    if dtype != torch.bfloat16:
        return
    # int32 tables are as good as int64 ones
    narrow = {
        name: value.int() if isinstance(value, Tensor) and value.dtype == torch.int64 else value
        for name, value in arguments.items()
    }
    assert torch.equal(out, mla_paged_decode(**narrow))


@pytest.mark.parametrize("lengths", [[300], [0, 200, 0, 0, 7, 70, 0], list(range(1, 36, 5)), [0, 0]], ids=str)
def test_sequences_shared_out_in_every_way(lengths: list[int]) -> None:
    """One cut into many pieces, several in one program, empty ones anywhere; and each run gives the same bits."""
    arguments = problem(lengths, 1, 3, 16, 8, 32, spare_pages=2)
    out = assert_equals_reference(arguments)
    assert torch.equal(out, mla_paged_decode(**arguments))


@pytest.mark.parametrize(("heads", "dtype"), [(3, torch.float32), (16, torch.bfloat16), (70, torch.bfloat16)], ids=str)
def test_fp8_latents(heads: int, dtype: torch.dtype) -> None:
    assert_equals_reference(problem([70, 0, 18], 1, heads, 256, 16, 64, dtype, fp8=True))


def test_scales_of_fp8_latents_far_apart() -> None:
    arguments = problem([60], 1, 4, 256, 16, 64, torch.bfloat16)
    keys_NW = torch.nan_to_num(arguments["cache_NW"].float())
    keys_NW[:, :256] *= 10.0 ** torch.linspace(-6, 1, len(keys_NW), device=DEVICE)[:, None]
    arguments["cache_NW"] = pack_fp8_latents(keys_NW[:, :256], keys_NW[:, 256:])
    assert_equals_reference(arguments)


def test_huge_scores() -> None:
    assert_equals_reference(problem([50, 3], 1, 4, 32, 16, 16, size=100.0))


def test_queries_that_see_only_a_part_or_nothing() -> None:
    arguments = problem([50, 40], 3, 4, 16, 8, 16)
    arguments["positions_BQ"] = torch.tensor([[0, 20, 49], [-1, 3, 60]], device=DEVICE)
    out = assert_equals_reference(arguments)
    assert torch.equal(out[1, 0], torch.zeros_like(out[1, 0]))


def test_queries_as_a_product_leaves_them_and_a_cache_within_another() -> None:
    arguments = problem([50, 40], 2, 4, 16, 8, 16)
    whole = mla_paged_decode(**arguments)
    for name in ("q_latent_BQHC", "q_rope_BQHR"):
        arguments[name] = arguments[name].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    arguments["cache_NW"] = torch.cat((arguments["cache_NW"], arguments["cache_NW"]), dim=1)[:, :24]
    assert torch.equal(whole, mla_paged_decode(**arguments))
