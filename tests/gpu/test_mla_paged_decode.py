"""Absorbed decode at DeepSeek's sizes, in CUDA graphs whose lengths change, and under torch.compile."""

from typing import Any

import pytest
import torch

from deepwright_kernels import backend_for, configure, dispatch, mla_paged_decode
from deepwright_kernels.mla_paged_decode.reference import pack_fp8_latents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

LATENT, ROPE, BLOCK = 512, 64, 64


def problem(lengths: list[int], heads: int, queries: int = 1, fp8: bool = False) -> dict[str, Any]:
    """Arguments of a call; the cache is NaN beyond the lengths."""
    torch.manual_seed(0)
    batch, pages = len(lengths), max(1, -(-max(lengths) // BLOCK))
    lengths_B = torch.tensor(lengths, device="cuda")
    blocks_BP = (torch.randperm(batch * pages, device="cuda") + 1).view(batch, pages)
    cache_NW = torch.randn((batch * pages + 1) * BLOCK, LATENT + ROPE, device="cuda").bfloat16()
    if fp8:
        cache_NW = pack_fp8_latents(cache_NW[:, :LATENT], cache_NW[:, LATENT:])
    index_K = torch.arange(pages * BLOCK, device="cuda")
    slots_BK = blocks_BP[:, index_K // BLOCK] * BLOCK + index_K % BLOCK
    cache_NW[slots_BK[index_K >= lengths_B[:, None]]] = 255 if fp8 else torch.nan
    return {
        "q_latent_BQHC": torch.randn(batch, queries, heads, LATENT, device="cuda").bfloat16(),
        "q_rope_BQHR": torch.randn(batch, queries, heads, ROPE, device="cuda").bfloat16(),
        "cache_NW": cache_NW,
        "blocks_BP": blocks_BP,
        "positions_BQ": lengths_B[:, None] - queries + torch.arange(queries, device="cuda"),
        "lengths_B": lengths_B,
        "block_size": BLOCK,
        "scale": 192**-0.5,
    }


def relative_error(have: torch.Tensor, want: torch.Tensor) -> float:
    return ((have.float() - want.float()).norm() / want.float().norm()).item()


def check(arguments: dict[str, Any], backend: str) -> None:
    """Near the reference, and the same bits again."""
    with configure({"mla_paged_decode": backend}):
        have, again = mla_paged_decode(**arguments), mla_paged_decode(**arguments)
    assert torch.isfinite(have).all()
    assert torch.equal(have, again)
    assert relative_error(have, dispatch.load("mla_paged_decode", "reference")(*arguments.values())) < 5e-3


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(
    ("lengths", "heads", "queries"),
    [
        ([1000] * 4, 16, 1),
        ([333, 64], 128, 2),
        ([5000, 0, 1, 63, 64, 65, 2000], 16, 4),
        ([700] * 140, 32, 1),
        (list(range(1, 3000, 10)), 5, 1),
    ],
    ids=["few", "128 heads", "4 queries", "many", "all lengths"],
)
def test_at_deepseeks_sizes(lengths: list[int], heads: int, queries: int, backend: str) -> None:
    check(problem(lengths, heads, queries), backend)


@pytest.mark.parametrize(("lengths", "heads"), [([1000] * 4, 16), ([333, 0, 4100], 128)], ids=["16 heads", "128 heads"])
def test_fp8_latents_at_deepseeks_sizes(lengths: list[int], heads: int) -> None:
    check(problem(lengths, heads, fp8=True), "auto")


def test_auto_goes_by_the_cache() -> None:
    """Hopper's kernel is for bfloat16; FP8 caches are Triton's everywhere."""
    hopper = "cuda" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    for lengths, heads in (([64] * 4, 16), ([2048] * 64, 16), ([2048] * 64, 128)):
        assert backend_for("mla_paged_decode", *problem(lengths, heads).values()) == hopper
        assert backend_for("mla_paged_decode", *problem(lengths, heads, fp8=True).values()) == "triton"


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_cuda_graph_follows_the_lengths(backend: str) -> None:
    arguments = problem([3000, 10, 700], 16)
    with configure({"mla_paged_decode": backend}):
        mla_paged_decode(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = mla_paged_decode(**arguments)
        for lengths in ([3000, 10, 700], [1, 9, 0], [64, 1, 699]):
            arguments["lengths_B"].copy_(torch.tensor(lengths))
            arguments["positions_BQ"].copy_(arguments["lengths_B"][:, None] - 1)
            graph.replay()
            want = dispatch.load("mla_paged_decode", "reference")(*arguments.values())
            assert relative_error(captured, want) < 5e-3


def test_no_host_synchronisation() -> None:
    arguments = problem([300, 10], 16)
    mla_paged_decode(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla_paged_decode(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inductor_goes_through_the_kernel_whole() -> None:
    arguments = problem([300, 10], 16)
    compiled = torch.compile(lambda **values: mla_paged_decode(**values) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), mla_paged_decode(**arguments) * 2)
