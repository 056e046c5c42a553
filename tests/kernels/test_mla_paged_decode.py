"""Absorbed decode against the attention it stands for: keys and values expanded per head, one query at a time."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import configure, mla_paged_decode
from deepwright_kernels.mla_paged_decode.reference import fp8_row_bytes, pack_fp8_latents, unpack_fp8_latents

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


def test_a_row_of_fp8_latents_byte_by_byte() -> None:
    latent_NC = torch.zeros(2, 256)
    latent_NC[0, :3] = torch.tensor([448.0, -1.0, 0.5])
    latent_NC[1, 128:] = 3.5
    rope_NR = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    rows_NW = pack_fp8_latents(latent_NC, rope_NR)
    assert rows_NW.dtype == torch.uint8
    assert rows_NW.shape == (2, fp8_row_bytes(256, 2)) == (2, 256 + 8 + 4)
    assert fp8_row_bytes(512, 64) == 656
    # e4m3: sign, four bits of exponent with bias 7, three of mantissa.
    assert rows_NW[0, :4].tolist() == [0b0_1111_110, 0b1_0111_000, 0b0_0110_000, 0]
    assert set(rows_NW[1, 128:256].tolist()) == {0b0_1111_110}
    scales = rows_NW[:, 256:264].contiguous().view(torch.float32)
    torch.testing.assert_close(scales, torch.tensor([[1.0, 1e-4 / 448], [1e-4 / 448, 3.5 / 448]]))
    assert torch.equal(rows_NW[:, 264:].contiguous().view(torch.bfloat16), rope_NR.bfloat16())
    unpacked_NC, unpacked_NR = unpack_fp8_latents(rows_NW, 256)
    assert torch.equal(unpacked_NC, latent_NC.bfloat16())
    assert torch.equal(unpacked_NR, rope_NR.bfloat16())


def test_fp8_latents_are_the_keys_they_stand_for() -> None:
    torch.manual_seed(0)
    latent_NC, rope_NR = torch.randn(3 * BLOCK, 128), torch.randn(3 * BLOCK, 6)
    rows_NW = pack_fp8_latents(latent_NC, rope_NR)
    keys_NW = torch.cat(unpack_fp8_latents(rows_NW, 128), -1)
    error = (keys_NW[:, :128].float() - latent_NC).abs()
    assert (error <= latent_NC.abs() / 16 + latent_NC.abs().amax(1, keepdim=True) / 448 / 512).all()
    rows_NW[-1] = 255  # NaN wherever it would be read
    blocks_BP, lengths_B = torch.tensor([[1, 2, 0]]), torch.tensor([2 * BLOCK - 1])
    q_latent, q_rope = torch.randn(1, 2, 3, 128), torch.randn(1, 2, 3, 6)
    arguments = blocks_BP, torch.tensor([[5, 6]]), lengths_B, BLOCK, 0.1
    with configure({"mla_paged_decode": "reference"}):
        have, want = (mla_paged_decode(q_latent, q_rope, cache_NW, *arguments) for cache_NW in (rows_NW, keys_NW))
    assert torch.equal(have, want)
    torch.testing.assert_close(mla_paged_decode(q_latent, q_rope, keys_NW, *arguments), want)


def test_fused_attention_gives_what_the_reference_gives() -> None:
    """On a CPU; queries that see nothing and NaN behind a length included."""
    torch.manual_seed(0)
    rows = [torch.randn(length, 12) for length in (11, 6, 1)]
    cache_NW, blocks_BP = paged(rows, 12)
    q_latent, q_rope = torch.randn(3, 3, 5, 8), torch.randn(3, 3, 5, 4)
    positions_BQ, lengths_B = torch.tensor([[8, 9, 10], [0, 5, 3], [0, 0, 0]]), torch.tensor([11, 6, 0])
    results = []
    for backend in ("torch", "reference"):
        with configure({"mla_paged_decode": backend}):
            results.append(mla_paged_decode(q_latent, q_rope, cache_NW, blocks_BP, positions_BQ, lengths_B, BLOCK, 0.3))
            clean_NW = cache_NW.nan_to_num(7.0)  # finite: nothing makes the fused attention ask the reference
            results.append(mla_paged_decode(q_latent, q_rope, clean_NW, blocks_BP, positions_BQ, lengths_B, BLOCK, 0.3))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert not results[0][2].any()


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
        ("q_latent_BQHC", torch.randn(1, 1, 4, 3).transpose(2, 3), "q_latent_BQHC has a last dimension of stride 3"),
        ("cache_NW", torch.randn(6, 2 * BLOCK).T, "cache_NW has a last dimension of stride 8"),
        (
            "cache_NW",
            torch.zeros(2 * BLOCK, 6, dtype=torch.uint8),
            "FP8 latents, 128 to a scale, but q_latent_BQHC has 4",
        ),
        ("q_rope_BQHR", torch.randn(1, 1, 3, 2, requires_grad=True), "q_rope_BQHR requires a gradient and decode has"),
    ]:
        with pytest.raises(ValueError, match=message):
            mla_paged_decode(**arguments | {name: wrong})
    with pytest.raises(TypeError, match="positions_BQ is float32"):
        mla_paged_decode(**arguments | {"positions_BQ": torch.zeros(1, 1)})
    with pytest.raises(TypeError, match="cache_NW is int8"):
        mla_paged_decode(**arguments | {"cache_NW": torch.zeros(2 * BLOCK, 6, dtype=torch.int8)})
    fp8 = arguments | {"q_latent_BQHC": torch.randn(1, 1, 3, 128)}
    with pytest.raises(ValueError, match=r"cache_NW has shape \[8, 130\]; expected \[N, bytes of 128 FP8 latents"):
        mla_paged_decode(**fp8 | {"cache_NW": torch.zeros(2 * BLOCK, 130, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="cache_NW holds FP8 latents beside 3 rope values; expected an even number"):
        mla_paged_decode(
            **fp8 | {"cache_NW": torch.zeros(2 * BLOCK, 138, dtype=torch.uint8), "q_rope_BQHR": torch.randn(1, 1, 3, 3)}
        )
    with pytest.raises(ValueError, match="cache_NW has rows 138 bytes apart"):
        mla_paged_decode(**fp8 | {"cache_NW": torch.zeros(2 * BLOCK, 138, dtype=torch.uint8)[:, :136]})
    with torch.no_grad():
        mla_paged_decode(**arguments | {"q_rope_BQHR": torch.randn(1, 1, 3, 2, requires_grad=True)})


def test_what_has_passed_once_does_not_let_anything_else_through() -> None:
    given = {
        "q_latent_BQHC": torch.randn(2, 1, 4, 8),
        "q_rope_BQHR": torch.randn(2, 1, 4, 4),
        "cache_NW": torch.randn(16, 12),
        "blocks_BP": torch.zeros(2, 1, dtype=torch.int64),
        "positions_BQ": torch.zeros(2, 1, dtype=torch.int64),
        "lengths_B": torch.ones(2, dtype=torch.int64),
        "block_size": 4,
        "scale": 1.0,
    }
    mla_paged_decode(**given)
    mla_paged_decode(**given)
    for name, wrong, error in (
        ("cache_NW", torch.randn(16, 13), ValueError),
        ("cache_NW", torch.randn(12, 16).t(), ValueError),
        ("cache_NW", torch.randn(16, 12).requires_grad_(), ValueError),
        ("lengths_B", torch.ones(2), TypeError),
        ("block_size", 5, ValueError),
    ):
        for _ in range(2):
            with pytest.raises(error, match=name if name != "block_size" else "cache_NW"):
                mla_paged_decode(**{**given, name: wrong})
    mla_paged_decode(**given)
