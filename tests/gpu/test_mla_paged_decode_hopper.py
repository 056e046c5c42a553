"""The decode kernel for Hopper against the reference: odd lengths, several queries, NaN beyond the length, graphs.

Queries and cache are as wide as DeepSeek-V3's, for the kernel takes no others.
"""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import configure, dispatch, mla_paged_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU; there is none here",
    ),
]
LATENT, ROPE, BLOCK = 512, 64, 64
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float]


def arguments(
    lengths: list[int],
    heads: int,
    queries: int = 1,
    pages: int = 0,
    index: torch.dtype = torch.int64,
    size: float = 1.0,
) -> Arguments:
    """Queries at the last positions of each sequence. The cache holds NaN wherever no sequence has a token."""
    torch.manual_seed(0)
    batch, pages = len(lengths), pages or max(1, -(-max(lengths) // BLOCK))
    lengths_B = torch.tensor(lengths, device="cuda", dtype=index)
    cache_NW = torch.randn((batch * pages + 1) * BLOCK, LATENT + ROPE, device="cuda").bfloat16() * size
    blocks_BP = torch.randperm(batch * pages, device="cuda").view(batch, pages) + 1
    slots_BK = (blocks_BP[:, :, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten(1)
    beyond_BK = torch.arange(pages * BLOCK, device="cuda") >= lengths_B[:, None]
    cache_NW[slots_BK[beyond_BK]] = float("nan")
    cache_NW[:BLOCK] = float("nan")
    blocks_BP = blocks_BP.masked_fill(beyond_BK[:, ::BLOCK], 0)
    return (
        torch.randn(batch, queries, heads, LATENT, device="cuda").bfloat16() * size,
        torch.randn(batch, queries, heads, ROPE, device="cuda").bfloat16() * size,
        cache_NW,
        blocks_BP.to(index),
        (lengths_B[:, None] - queries + torch.arange(queries, device="cuda")).to(index),
        lengths_B,
        BLOCK,
        (128 + ROPE) ** -0.5,
    )


def both(given: Arguments) -> tuple[Tensor, Tensor]:
    with configure({"mla_paged_decode": "cuda"}):
        have = mla_paged_decode(*given)
    return have, dispatch.load("mla_paged_decode", "reference")(*given)


def far(have: Tensor, want: Tensor) -> float:
    return float((have.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("heads", [1, 16, 24, 64, 128])
@pytest.mark.parametrize("lengths", [[1], [64], [65, 128, 1], [129, 0, 1000, 63], [5000, 3]])
def test_odd_lengths_beside_nan(heads: int, lengths: list[int]) -> None:
    have, want = both(arguments(lengths, heads))
    assert not have.isnan().any()
    assert far(have, want) < 5e-3
    for sequence, length in enumerate(lengths):
        assert length > 0 or not have[sequence].any()


@pytest.mark.parametrize("queries", [2, 3, 4])
@pytest.mark.parametrize("heads", [16, 128])
def test_several_queries_see_up_to_their_own_position(heads: int, queries: int) -> None:
    have, want = both(arguments([700, 64, 66, 4, 1025], heads, queries, index=torch.int32))
    assert far(have, want) < 5e-3


def test_positions_far_before_the_end_and_before_the_beginning() -> None:
    given = list(arguments([700, 30, 1000], 16, 2))
    given[4] = torch.tensor([[10, 600], [-1, 29], [70, 5]], device="cuda")
    have, want = both(tuple(given))
    assert far(have, want) < 5e-3
    assert not have[1, 0].any()


@pytest.mark.parametrize(("batch", "heads"), [(300, 16), (150, 128)])
def test_many_sequences_of_all_lengths(batch: int, heads: int) -> None:
    have, want = both(arguments([sequence * sequence * 37 % 2900 for sequence in range(batch)], heads))
    assert far(have, want) < 5e-3


def test_one_long_sequence_among_short_ones() -> None:
    have, want = both(arguments([20000 if sequence == 20 else sequence for sequence in range(33)], 16))
    assert far(have, want) < 5e-3


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_small_and_huge_values(size: float) -> None:
    have, want = both(arguments([640, 333], 16, size=size))
    assert far(have, want) < 5e-3


def test_strided_queries_and_a_table_with_room_to_spare() -> None:
    given = list(arguments([640, 3], 16, 2, pages=100))
    want = dispatch.load("mla_paged_decode", "reference")(*given)
    given[0] = given[0].transpose(1, 2).contiguous().transpose(1, 2)
    given[1] = torch.cat([given[1], given[1]], dim=-1)[..., 1 : ROPE + 1]  # begins between two multiples of 16 bytes
    given[1].copy_(torch.as_tensor(arguments([640, 3], 16, 2, pages=100)[1]))
    with configure({"mla_paged_decode": "cuda"}):
        have = mla_paged_decode(*given)
    assert far(have, want) < 5e-3


def test_the_same_from_run_to_run() -> None:
    given = arguments([4000, 17, 900, 33000], 128)
    with configure({"mla_paged_decode": "cuda"}):
        first = mla_paged_decode(*given)
        assert all(torch.equal(first, mla_paged_decode(*given)) for _ in range(5))


def test_in_a_graph_the_lengths_may_change() -> None:
    given = arguments([4000, 17, 900, 3000], 16)
    with configure({"mla_paged_decode": "cuda"}):
        mla_paged_decode(*given)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mla_paged_decode(*given)
        for lengths in ([4000, 17, 900, 3000], [3000, 1, 0, 2999], [64, 17, 640, 1]):
            given[5].copy_(torch.tensor(lengths))
            given[4].copy_(given[5][:, None] - 1)
            graph.replay()
            assert far(out, dispatch.load("mla_paged_decode", "reference")(*given)) < 5e-3


def test_compiled() -> None:
    given = arguments([400, 17, 900], 16)
    with configure({"mla_paged_decode": "cuda"}):
        whole = torch.compile(lambda *tensors: mla_paged_decode(*tensors, BLOCK, 0.07) * 2, fullgraph=True)
        assert torch.equal(whole(*given[:6]), mla_paged_decode(*given[:6], BLOCK, 0.07) * 2)


def test_what_it_does_not_take_is_said() -> None:
    given = arguments([64], 16)

    def why_not(*arguments: object) -> str:
        return str(dispatch.reasons("mla_paged_decode", *arguments)["cuda"])

    assert why_not(*given) == "None"
    assert "bfloat16" in why_not(given[0].float(), given[1].float(), given[2].float(), *given[3:])
    assert "512 + 64 and these are 448 + 64" in why_not(given[0][..., :448], *given[1:])
    assert "64 tokens and these hold 16" in why_not(*given[:6], 16, given[7])
    assert "positive scale" in why_not(*given[:7], -1.0)
    with configure({"mla_paged_decode": "cuda"}), pytest.raises(ValueError, match="blocks hold 64 tokens"):
        mla_paged_decode(*given[:6], 16, given[7])
