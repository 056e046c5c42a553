"""Absorbed decode against the attention it stands for: keys and values expanded per head, one query at a time."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import mla_paged_decode

BLOCK = 4


def paged(rows: list[Tensor], width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A cache of NaN with each sequence's rows in blocks drawn at random, and the table of blocks."""
    needed = [-(-len(row) // BLOCK) for row in rows]
    order = (torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    cache_NW = torch.full(((len(order) + 1) * BLOCK, width), torch.nan, dtype=rows[0].dtype)
    blocks_BP = torch.zeros(len(rows), max(1, *needed), dtype=torch.int64)
    for sequence, row in enumerate(rows):
        for page in range(needed[sequence]):
            block = order.pop()
            blocks_BP[sequence, page] = block
            part = row[page * BLOCK : (page + 1) * BLOCK]
            cache_NW[block * BLOCK : block * BLOCK + len(part)] = part
    return cache_NW, blocks_BP


@pytest.mark.parametrize(("heads", "latent", "rope"), [(1, 1, 2), (3, 8, 4), (5, 7, 6)])
def test_equals_attention_with_expanded_keys_and_values(heads: int, latent: int, rope: int) -> None:
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    lengths, nope, value, scale = [9, 4, 1], 5, 3, 0.37
    rows = [torch.randn(length, latent + rope, **options) for length in lengths]
    cache_NW, blocks_BP = paged(rows, latent + rope)
    positions_BQ = torch.tensor([[7, 8], [3, 0], [0, 0]])
    up_key_HPC = torch.randn(heads, nope, latent, **options)
    up_value_HVC = torch.randn(heads, value, latent, **options)
    q_nope_BQHP, q_rope_BQHR = torch.randn(3, 2, heads, nope, **options), torch.randn(3, 2, heads, rope, **options)

    q_latent_BQHC = torch.einsum("bqhp,hpc->bqhc", q_nope_BQHP, up_key_HPC)
    mixed_BQHC = mla_paged_decode(
        q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, torch.tensor(lengths), BLOCK, scale
    )
    have_BQHV = torch.einsum("bqhc,hvc->bqhv", mixed_BQHC, up_value_HVC)

    for sequence, row in enumerate(rows):
        for query in range(2):
            seen = row[: positions_BQ[sequence, query] + 1]
            for head in range(heads):
                keys = torch.cat((seen[:, :latent] @ up_key_HPC[head].T, seen[:, latent:]), -1)
                q = torch.cat((q_nope_BQHP[sequence, query, head], q_rope_BQHR[sequence, query, head]))
                weights = (keys @ q * scale).softmax(0)
                want_V = weights @ (seen[:, :latent] @ up_value_HVC[head].T)
                torch.testing.assert_close(have_BQHV[sequence, query, head], want_V)


def test_where_the_pages_lie_does_not_matter() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(11, 12), torch.randn(6, 12)]
    q_latent, q_rope = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 4)
    positions_BQ, lengths_B = torch.tensor([[10], [5]]), torch.tensor([11, 6])
    first, second = (
        mla_paged_decode(q_latent, q_rope, *paged(rows, 12, seed), positions_BQ, lengths_B, BLOCK, 0.3)
        for seed in (1, 2)
    )
    assert torch.equal(first, second)


def test_a_padded_query_of_an_empty_sequence_gives_zeros() -> None:
    cache_NW = torch.full((2 * BLOCK, 6), torch.nan)
    out = mla_paged_decode(
        torch.randn(1, 2, 3, 4),
        torch.randn(1, 2, 3, 2),
        cache_NW,
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        BLOCK,
        0.3,
    )
    assert torch.equal(out, torch.zeros(1, 2, 3, 4))


def test_no_sequences() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    out = mla_paged_decode(
        torch.randn(0, 1, 3, 4), torch.randn(0, 1, 3, 2), torch.randn(BLOCK, 6), empty.view(0, 1), empty.view(0, 1),
        empty, BLOCK, 0.3,
    )  # fmt: skip
    assert out.shape == (0, 1, 3, 4)


def test_errors_name_the_argument() -> None:
    arguments = {
        "q_latent_BQHC": torch.randn(1, 1, 3, 4),
        "q_rope_BQHR": torch.randn(1, 1, 3, 2),
        "cache_NW": torch.randn(2 * BLOCK, 6),
        "blocks_BP": torch.ones(1, 1, dtype=torch.int64),
        "positions_BQ": torch.zeros(1, 1, dtype=torch.int64),
        "lengths_B": torch.ones(1, dtype=torch.int64),
        "block_size": BLOCK,
        "scale": 0.5,
    }
    mla_paged_decode(**arguments)
    for name, wrong, message in [
        ("cache_NW", torch.randn(2 * BLOCK, 7), r"cache_NW has shape \[8, 7\]; expected \[N, C \+ R\] = \[any, 6\]"),
        ("q_rope_BQHR", torch.randn(1, 2, 3, 2), "q_rope_BQHR has shape"),
        ("blocks_BP", torch.ones(2, 1, dtype=torch.int64), "blocks_BP has shape"),
        ("lengths_B", torch.ones(2, dtype=torch.int64), "lengths_B has shape"),
        ("block_size", 3, "cache_NW has 8 slots; expected a multiple of block_size = 3"),
        ("block_size", 0, "block_size is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            mla_paged_decode(**arguments | {name: wrong})
    with pytest.raises(TypeError, match="positions_BQ is float32"):
        mla_paged_decode(**arguments | {"positions_BQ": torch.zeros(1, 1)})
