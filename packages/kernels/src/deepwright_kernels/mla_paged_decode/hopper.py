"""Absorbed decode over a paged latent cache on Hopper: host side of `hopper.cu`, which has the idea of the kernel.

A block works on 64 (query, head) rows of one sequence. Where that gives fewer blocks than the GPU has processors, the
keys of each sequence are cut into equal shares, as many as the shapes allow for: the lengths stay on the device. Each
share leaves its output in float32 and the logarithm of its sum, and a second kernel combines them.

Leaves out: caches in FP8 or other floats, widths other than 512 + 64, pages of other than 64 tokens.

Shapes: B sequences, Q new tokens of each, H heads, C latent, R rope key, N cache slots, P blocks of the longest
sequence, S shares.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import Kernel, TensorMap, kernel

SOURCE = Path(__file__).with_name("hopper.cu")
LATENT, ROPE, PAGE = 512, 64, 64
ROWS, CHUNK, THREADS = 64, 64, 384
# Queries and two pages, each 64 x 576 values, and the barriers and row statistics behind them.
SHARED_BYTES = 3 * ROWS * (LATENT + ROPE) * 2 + 2048
LOG2_E = 1.4426950408889634
# What a block costs beyond its pages (it starts, loads its queries, fills its pipeline, writes), counted in pages.
OVERHEAD = 4
# And what the second kernel adds to a call.
COMBINE = 3
_C_TYPES = {torch.int32: "int", torch.int64: "long long"}


@cache
def shares(items: int, pages: int, processors: int) -> int:
    """Into how many shares to cut the keys of each of `items` (sequence, row tile) pairs of up to `pages` pages.

    The fewest rounds of blocks times the length of a block; one share needs no second kernel.
    """

    def cost(count: int) -> int:
        rounds = -(-items * count // processors)
        return rounds * (-(-pages // count) + OVERHEAD) + (COMBINE if count > 1 else 0)

    return min(range(1, max(1, min(pages, 2 * processors // max(1, items))) + 1), key=cost)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _kernels(blocks: Tensor, positions: Tensor, lengths: Tensor) -> tuple[Kernel, Kernel]:
    defines = {
        "BLOCKS_T": _C_TYPES[blocks.dtype],
        "POSITIONS_T": _C_TYPES[positions.dtype],
        "LENGTHS_T": _C_TYPES[lengths.dtype],
    }
    return (
        kernel(SOURCE, "mla_decode", defines, SHARED_BYTES, blocks.device),
        kernel(SOURCE, "mla_combine", defines, 0, blocks.device),
    )


def _in_pieces_of_16_bytes(tensor: Tensor) -> Tensor:
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
    return tensor if aligned and tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("deepwright::mla_paged_decode_hopper", mutates_args=())
def _decode(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    batch, queries, heads, latent = q_latent_BQHC.shape
    rows, pages, device = queries * heads, blocks_BP.shape[1], q_latent_BQHC.device
    out_BQHC = torch.empty(q_latent_BQHC.shape, dtype=q_latent_BQHC.dtype, device=device)
    if out_BQHC.numel() == 0:
        return out_BQHC
    q_latent_BQHC, q_rope_BQHR = _in_pieces_of_16_bytes(q_latent_BQHC), _in_pieces_of_16_bytes(q_rope_BQHR)
    blocks_BP, positions_BQ, lengths_B = blocks_BP.contiguous(), positions_BQ.contiguous(), lengths_B.contiguous()

    tiles = -(-rows // ROWS)
    count = shares(batch * tiles, pages, _processors(device))
    part_SXC = torch.empty((count, batch * rows, latent) if count > 1 else (0,), dtype=torch.float32, device=device)
    weight_SX = torch.empty((count, batch * rows) if count > 1 else (0,), dtype=torch.float32, device=device)
    decode, combine = _kernels(blocks_BP, positions_BQ, lengths_B)
    decode.launch(
        (tiles * count * batch, 1, 1),
        (THREADS, 1, 1),
        TensorMap(cache_NW, (PAGE, CHUNK)),
        q_latent_BQHC,
        q_rope_BQHR,
        blocks_BP,
        positions_BQ,
        lengths_B,
        out_BQHC,
        part_SXC,
        weight_SX,
        batch,
        queries,
        heads,
        pages,
        count,
        *q_latent_BQHC.stride()[:3],
        *q_rope_BQHR.stride()[:3],
        scale * LOG2_E,  # the kernel works in powers of two
    )
    if count > 1:
        combine.launch((batch * rows, 1, 1), (latent // 4, 1, 1), part_SXC, weight_SX, out_BQHC, batch * rows, count)
    return out_BQHC


@_decode.register_fake
def _(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    return torch.empty(q_latent_BQHC.shape, dtype=q_latent_BQHC.dtype, device=q_latent_BQHC.device)


def mla_paged_decode(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """See the operator's docstring."""
    return _decode(q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale)
