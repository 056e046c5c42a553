"""The order of experts as a counting sort in Triton: stable, deterministic, one launch or three.

Few copies: a program for each expert counts all copies (so it knows where its rows begin), then places its own. Reading
everything once for each expert costs little while it all lies in the cache, and a launch is what the time goes to.

Many copies: blocks of copies are counted, a column scan turns the counts into what lies before each block, and each
copy's place is start of its expert + copies before its block + equal ones before it in its block. The last number comes
from comparing all pairs of a block, a thread for each copy: no atomic addition whose order could vary.

Shapes: N (or P) copies of a block, E experts, B blocks, R rows in expert order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import Operation

FEW_COPIES = 2048
BLOCK_COPIES = 128
SCAN_ROWS, SCAN_COLUMNS, SCAN_WARPS = 1024, 4, 8


@triton.jit
def _ends(counts_E, ALIGNMENT: tl.constexpr):
    aligned_E = (counts_E + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return tl.cumsum(aligned_E, axis=0), aligned_E


@triton.jit
def _fill_gaps(order_ptr, expert, start, count, aligned, last_end, rows, ALIGNMENT: tl.constexpr):
    """-1 behind the expert's copies, and in the expert's share of the rows that nobody needs."""
    offset_A = tl.arange(0, ALIGNMENT)
    gap_A = -1 + tl.zeros((ALIGNMENT,), dtype=tl.int32)
    tl.store(order_ptr + start + count + offset_A, gap_A, mask=count + offset_A < aligned)
    tail_A = last_end + expert * ALIGNMENT + offset_A
    tl.store(order_ptr + tail_A, gap_A, mask=tail_A < rows)


@triton.jit
def _one_launch_kernel(
    experts_ptr,
    order_ptr,
    place_ptr,
    counts_ptr,
    ends_ptr,
    copies,
    rows,
    EXPERTS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    expert = tl.program_id(0)
    expert_E, offset_N = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    counts_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, copies, BLOCK_N):
        inside_N = first + offset_N < copies
        expert_N = tl.load(experts_ptr + first + offset_N, mask=inside_N, other=0).to(tl.int32)
        counts_E += tl.histogram(expert_N, BLOCK_E, mask=inside_N)
    ends_E, aligned_E = _ends(counts_E, ALIGNMENT)
    if expert == 0:
        tl.store(counts_ptr + expert_E, counts_E.to(tl.int64), mask=expert_E < EXPERTS)
        tl.store(ends_ptr + expert_E, ends_E, mask=expert_E < EXPERTS)
    mine_E = expert_E == expert
    start = tl.sum(tl.where(mine_E, ends_E - aligned_E, 0), axis=0)
    place = start
    for first in range(0, copies, BLOCK_N):
        copy_N = first + offset_N
        expert_N = tl.load(experts_ptr + copy_N, mask=copy_N < copies, other=-1).to(tl.int32)
        mine_N = (expert_N == expert).to(tl.int32)
        place_N = place + tl.cumsum(mine_N, axis=0) - 1
        tl.store(order_ptr + place_N, copy_N, mask=mine_N != 0)
        tl.store(place_ptr + copy_N, place_N, mask=mine_N != 0)
        place += tl.sum(mine_N, axis=0)
    if ALIGNMENT > 1:
        aligned = tl.sum(tl.where(mine_E, aligned_E, 0), axis=0)
        last_end = tl.sum(aligned_E, axis=0)
        _fill_gaps(order_ptr, expert, start, place - start, aligned, last_end, rows, ALIGNMENT)


@triton.jit
def _count_kernel(experts_ptr, before_ptr, copies, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    block = tl.program_id(0)
    copy_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = copy_N < copies
    expert_N = tl.load(experts_ptr + copy_N, mask=inside_N, other=0).to(tl.int32)
    expert_E = tl.arange(0, BLOCK_E)
    counts_E = tl.histogram(expert_N, BLOCK_E, mask=inside_N)
    tl.store(before_ptr + block.to(tl.int64) * EXPERTS + expert_E, counts_E, mask=expert_E < EXPERTS)


@triton.jit
def _scan_kernel(before_ptr, counts_ptr, blocks, EXPERTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    expert_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, blocks, BLOCK_B):
        block_B = first + tl.arange(0, BLOCK_B)
        here_BE = (block_B < blocks)[:, None] & (expert_E < EXPERTS)[None, :]
        at_BE = before_ptr + block_B.to(tl.int64)[:, None] * EXPERTS + expert_E[None, :]
        count_BE = tl.load(at_BE, mask=here_BE, other=0)
        tl.store(at_BE, total_E[None, :] + tl.cumsum(count_BE, axis=0) - count_BE, mask=here_BE)
        total_E += tl.sum(count_BE, axis=0)
    tl.store(counts_ptr + expert_E, total_E.to(tl.int64), mask=expert_E < EXPERTS)


@triton.jit
def _place_kernel(
    experts_ptr,
    before_ptr,
    counts_ptr,
    order_ptr,
    place_ptr,
    ends_ptr,
    copies,
    blocks,
    rows,
    EXPERTS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    counts_E = tl.load(counts_ptr + expert_E, mask=expert_E < EXPERTS, other=0).to(tl.int32)
    ends_E, aligned_E = _ends(counts_E, ALIGNMENT)
    if program < blocks:
        offset_N = tl.arange(0, BLOCK_N)
        copy_N = program * BLOCK_N + offset_N
        inside_N = copy_N < copies
        expert_N = tl.load(experts_ptr + copy_N, mask=inside_N, other=0).to(tl.int32)
        earlier_PN = (expert_N[:, None] == expert_N[None, :]) & (offset_N[:, None] < offset_N[None, :])
        rank_N = tl.sum(earlier_PN.to(tl.int32), axis=0)
        start_N = tl.gather(ends_E - aligned_E, expert_N, axis=0)
        before_N = tl.load(before_ptr + program.to(tl.int64) * EXPERTS + expert_N, mask=inside_N, other=0)
        place_N = start_N + before_N + rank_N
        tl.store(order_ptr + place_N, copy_N, mask=inside_N)
        tl.store(place_ptr + copy_N, place_N, mask=inside_N)
        if program == 0:
            tl.store(ends_ptr + expert_E, ends_E, mask=expert_E < EXPERTS)
    else:
        expert = program - blocks
        mine_E = expert_E == expert
        aligned = tl.sum(tl.where(mine_E, aligned_E, 0), axis=0)
        start = tl.sum(tl.where(mine_E, ends_E, 0), axis=0) - aligned
        count = tl.sum(tl.where(mine_E, counts_E, 0), axis=0)
        _fill_gaps(order_ptr, expert, start, count, aligned, tl.sum(aligned_E, axis=0), rows, ALIGNMENT)


def _launch(experts_TK: Tensor, experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts_TK = experts_TK.contiguous()
    copies, device = experts_TK.numel(), experts_TK.device
    rows = (copies + experts * (alignment - 1)) // alignment * alignment
    order_R = torch.empty(rows, dtype=torch.int32, device=device)
    place_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    counts_E = torch.empty(experts, dtype=torch.int64, device=device)
    ends_E = torch.empty(experts, dtype=torch.int32, device=device)
    block_experts = triton.next_power_of_2(experts)
    if copies <= FEW_COPIES:
        _one_launch_kernel[(experts,)](
            experts_TK,
            order_R,
            place_TK,
            counts_E,
            ends_E,
            copies,
            rows,
            EXPERTS=experts,
            ALIGNMENT=alignment,
            BLOCK_E=block_experts,
            BLOCK_N=min(1024, max(16, triton.next_power_of_2(copies))),
            num_warps=4,
        )
        return order_R, place_TK, counts_E, ends_E
    blocks = triton.cdiv(copies, BLOCK_COPIES)
    before_BE = torch.empty(blocks, experts, dtype=torch.int32, device=device)
    _count_kernel[(blocks,)](
        experts_TK, before_BE, copies, EXPERTS=experts, BLOCK_E=block_experts, BLOCK_N=BLOCK_COPIES, num_warps=4
    )
    _scan_kernel[(triton.cdiv(experts, SCAN_COLUMNS),)](
        before_BE, counts_E, blocks, EXPERTS=experts, BLOCK_B=SCAN_ROWS, BLOCK_E=SCAN_COLUMNS, num_warps=SCAN_WARPS
    )
    _place_kernel[(blocks + (experts if alignment > 1 else 0),)](
        experts_TK,
        before_BE,
        counts_E,
        order_R,
        place_TK,
        ends_E,
        copies,
        blocks,
        rows,
        EXPERTS=experts,
        ALIGNMENT=alignment,
        BLOCK_E=block_experts,
        BLOCK_N=BLOCK_COPIES,
        num_warps=4,
    )
    return order_R, place_TK, counts_E, ends_E


_order = Operation("expert_order", _launch)


@_order.shapes
def _(experts_TK: Tensor, experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (experts_TK.numel() + experts * (alignment - 1)) // alignment * alignment
    return (
        experts_TK.new_empty(rows, dtype=torch.int32),
        experts_TK.new_empty(experts_TK.shape, dtype=torch.int32),
        experts_TK.new_empty(experts, dtype=torch.int64),
        experts_TK.new_empty(experts, dtype=torch.int32),
    )


def expert_order(experts_TK: Tensor, experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order_R, place_TK, counts_E, ends_E)."""
    return _order(experts_TK, experts, alignment)
