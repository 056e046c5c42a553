"""Absorbed decode: kernel against reference."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dispatch, mla_paged_decode

from .sides import DEVICE, TOLERANCE, draw


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
