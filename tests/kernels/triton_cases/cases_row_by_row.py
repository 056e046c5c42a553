"""The forms in which no row knows of another: right against the references, and bit for bit the same in any company."""

import pytest
import torch

from deepwright_kernels import dispatch
from deepwright_kernels.row_by_row import triton as forms

from .sides import DEVICE, TOLERANCE, draw

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("matrices", "count", "inputs", "outputs"), [(1, 1, 5, 3), (1, 37, 40, 33), (3, 18, 16, 20)])
def test_products(dtype: torch.dtype, matrices: int, count: int, inputs: int, outputs: int) -> None:
    x_ZTK, w_ZNK = draw(matrices, count, inputs, dtype=dtype), draw(matrices, outputs, inputs, dtype=dtype)
    w_ZKN = w_ZNK.transpose(1, 2)
    whole = forms.rows(x_ZTK, w_ZKN)
    torch.testing.assert_close(
        whole.float(), x_ZTK.float() @ w_ZKN.float(), rtol=TOLERANCE[dtype]["rtol"], atol=10 * TOLERANCE[dtype]["atol"]
    )
    for rows in (slice(0, 1), slice(count // 2, count), torch.randperm(count, device=DEVICE)):
        assert torch.equal(forms.rows(x_ZTK[:, rows], w_ZKN), whole[:, rows])
    assert torch.equal(forms.rows(x_ZTK, w_ZKN.contiguous()), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_products(dtype: torch.dtype) -> None:
    counts, inputs, outputs = [17, 0, 21, 3], 24, 20
    ends_E = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    x_RK, weight_ENK = draw(sum(counts) + 4, inputs, dtype=dtype), draw(len(counts), outputs, inputs, dtype=dtype)
    whole = forms.grouped(x_RK, weight_ENK, ends_E)
    want = dispatch.load("grouped_linear", "reference")(x_RK.float(), weight_ENK.float(), ends_E)
    torch.testing.assert_close(whole.float(), want, rtol=TOLERANCE[dtype]["rtol"], atol=10 * TOLERANCE[dtype]["atol"])
    assert (whole[sum(counts) :] == 0).all()
    for row, expert in ((0, 0), (16, 0), (17, 2), (40, 3)):
        alone = torch.zeros(len(counts), dtype=torch.int32, device=DEVICE)
        alone[expert:] = 1
        assert torch.equal(forms.grouped(x_RK[row : row + 1], weight_ENK, alone)[0], whole[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "latent", "rope", "size"), [(3, 24, 8, 4), (16, 32, 16, 64)])
def test_latent_attention(dtype: torch.dtype, heads: int, latent: int, rope: int, size: int) -> None:
    lengths, blocks = [75, 9], 40
    cache_NW = draw((blocks + 1) * size, latent + rope, dtype=dtype)
    blocks_BP = torch.randperm(blocks, device=DEVICE)[: 2 * (-(-75 // size))].view(2, -1) + 1
    lengths_B = torch.tensor(lengths, device=DEVICE)
    for row, length in enumerate(lengths):  # what lies beyond a length is never used
        last = blocks_BP[row, length // size] * size + length % size
        cache_NW[last : (last // size + 1) * size] = torch.nan
    q_c, q_r = draw(2, 9, heads, latent, dtype=dtype), draw(2, 9, heads, rope, dtype=dtype)
    positions_BQ = lengths_B[:, None] - 9 + torch.arange(9, device=DEVICE)
    rest = (size, 0.2)
    whole = forms.latent_attention(q_c, q_r, cache_NW, blocks_BP, positions_BQ, lengths_B, *rest)
    wide = (t.float() for t in (q_c, q_r, cache_NW))
    want = dispatch.load("mla_paged_decode", "reference")(*wide, blocks_BP, positions_BQ, lengths_B, *rest)
    torch.testing.assert_close(whole.float(), want, rtol=TOLERANCE[dtype]["rtol"], atol=3 * TOLERANCE[dtype]["atol"])
    for b in range(2):
        for first, last in ((0, 1), (4, 7), (8, 9)):
            part = forms.latent_attention(
                q_c[b : b + 1, first:last],
                q_r[b : b + 1, first:last],
                cache_NW,
                blocks_BP[b : b + 1],
                positions_BQ[b : b + 1, first:last],
                positions_BQ[b : b + 1, last - 1] + 1,
                *rest,
            )
            assert torch.equal(part[0], whole[b, first:last])
