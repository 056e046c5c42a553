"""Absorbed decode over a paged latent cache on Hopper: host side of `hopper.cu`, which has the idea of the kernel.

As many blocks run as the GPU has processors. They form groups, a block of a group for each tile of 64 (query, head)
rows, and each group takes an equal share of all sequences' keys: the lengths are read on the device. What belongs to a
sequence that several groups share is left in float32 with the logarithm of its sum, and a second kernel combines it.

Leaves out: caches in FP8 or other floats, widths other than 512 + 64, pages of other than 64 tokens.

Shapes: B sequences, Q new tokens of each, H heads, C latent, R rope key, N cache slots, P blocks of the longest
sequence, G groups, X = Q * H rows of a sequence.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import Kernel, TensorMap, kernel
from ..operation import Operation

SOURCE = Path(__file__).with_name("hopper.cu")
# A block's rows and keys of a page, the values of a swizzled row, and threads: three warpgroups.
ROWS, PAGE, CHUNK, THREADS = 64, 64, 64, 384
# Queries and two pages, each 64 x 576 values, and the barriers and row statistics behind them.
SHARED_BYTES = 3 * ROWS * 576 * 2 + 2048
COMBINE_BLOCKS_PER_PROCESSOR = 6  # as many as fit at once
LOG2_E = 1.4426950408889634
_C_TYPES = {torch.int32: "int", torch.int64: "long long"}


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernels(
    blocks: torch.dtype, positions: torch.dtype, lengths: torch.dtype, device: torch.device
) -> tuple[Kernel, Kernel]:
    defines: dict[str, int | str] = {
        "BLOCKS_T": _C_TYPES[blocks],
        "POSITIONS_T": _C_TYPES[positions],
        "LENGTHS_T": _C_TYPES[lengths],
    }
    return (
        kernel(SOURCE, "mla_decode", defines, SHARED_BYTES, device),
        kernel(SOURCE, "mla_combine", defines, 0, device),
    )


def _in_pieces_of_16_bytes(tensor: Tensor) -> Tensor:
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
    return tensor if aligned and tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def _launch(
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
    rows, device = queries * heads, q_latent_BQHC.device
    out_BQHC = torch.empty(q_latent_BQHC.shape, dtype=q_latent_BQHC.dtype, device=device)
    if out_BQHC.numel() == 0:
        return out_BQHC
    q_latent_BQHC, q_rope_BQHR = _in_pieces_of_16_bytes(q_latent_BQHC), _in_pieces_of_16_bytes(q_rope_BQHR)
    blocks_BP, positions_BQ, lengths_B = blocks_BP.contiguous(), positions_BQ.contiguous(), lengths_B.contiguous()

    tiles = -(-rows // ROWS)
    groups = max(1, _processors(device) // tiles)
    # A group shares its first and its last sequence with others: outputs in parts, their weights, and who has which. In
    # one piece of memory, because each allocation costs the host several microseconds.
    lines = 2 * groups * rows
    workspace = torch.empty(lines * (latent + 1) + 2 * batch, dtype=torch.float32, device=device)
    parts = workspace.data_ptr()
    weights = parts + 4 * lines * latent
    plan = weights + 4 * lines
    decode, combine = _kernels(blocks_BP.dtype, positions_BQ.dtype, lengths_B.dtype, device)
    decode.launch(
        (tiles * groups, 1, 1),
        (THREADS, 1, 1),
        TensorMap(cache_NW, (PAGE, CHUNK)),
        q_latent_BQHC,
        q_rope_BQHR,
        blocks_BP,
        positions_BQ,
        lengths_B,
        out_BQHC,
        parts,
        weights,
        plan,
        batch,
        queries,
        heads,
        blocks_BP.shape[1],
        groups,
        *q_latent_BQHC.stride()[:3],
        *q_rope_BQHR.stride()[:3],
        scale * LOG2_E,  # the kernel works in powers of two
    )
    slices = max(1, min(rows, COMBINE_BLOCKS_PER_PROCESSOR * _processors(device) // batch))
    combine.launch((batch, slices, 1), (latent // 2, 1, 1), parts, weights, plan, out_BQHC, rows, early=True)
    return out_BQHC


_decode = Operation("mla_paged_decode_hopper", _launch)


@_decode.shapes
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
    out_BQHC: Tensor = _decode(
        q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale
    )
    return out_BQHC
