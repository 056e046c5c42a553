"""Cross-entropy of a linear head in slices of the vocabulary, as Triton kernels and cuBLAS products.

Forward, what a token needs of its logits is the log-partition, the entropy and the target's logit. On a GPU whose
copy engine serves Triton (tiles.py) the product's tiles are reduced to these before they leave the SM; elsewhere the
logits of a slice of the vocabulary are made in a buffer, and one pass merges what they give into that of the slices
before. Kept for the backward pass is one number a token, the log-partition.

Backward, the gradient of a slice's logits, (softmax − one-hot) · upstream / temperature, is made in the buffer in the
same two ways, and two products follow. Because all tokens of a block see a slice at once, the slice's gradient of the
weight is a single product, rounded once; only the gradient of the hidden states is summed over slices, in float32. A
weight in another dtype than the hidden states is cast slice by slice.

Leaves out: splitting the vocabulary over ranks, and leaving out tokens that are ignored (their rows of the products
are made and multiplied by zero: how many there are, the host would have to wait for).

Shapes: T tokens, D hidden size, V vocabulary, K tokens of a block, C columns of a slice of the vocabulary, N tiles
across a row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import LN_2, LOG2_E

# Tokens that share a product. More would not make products faster, only slices narrower.
BLOCK_TOKENS = 16384
# The buffer that holds the logits of a block of tokens and a slice of the vocabulary.
BUFFER_BYTES = 2**28
# A slice's columns are a multiple of this, which is a tile's width.
COLUMNS_MULTIPLE = tiles.BLOCK_C
# Columns of a weight that are cast at a time where no logits are written.
CAST_COLUMNS = 8192


@triton.jit
def _reduce_kernel(
    logits_ptr,
    targets_ptr,
    partition_ptr,
    chosen_ptr,
    loss_ptr,
    entropy_ptr,
    stride,
    columns,
    first_column,
    ignore_index,
    scale_log2,
    LN_2: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One row a program. Everything is in powers of two until the results are written. What slices before this one
    # have left is merged: with w the share of a part in the whole partition sum, H = Σ w (H_part − log w).
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    end = tl.where(ignored, 0, columns)
    top = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    weighted = tl.zeros((), dtype=tl.float32)
    for start in range(0, end, BLOCK_C):
        column_C = start + tl.arange(0, BLOCK_C)
        inside_C = column_C < columns
        logit_C = tl.load(logits_ptr + row * stride + column_C, mask=inside_C, other=float("-inf")).to(tl.float32)
        logit_C *= scale_log2
        new_top = tl.maximum(top, tl.max(logit_C, axis=0))
        shifted_C = logit_C - new_top
        exp_C = tl.exp2(shifted_C)
        # Before the first block top is −inf: nothing is there to shift, and −inf · 0 would be NaN.
        shift = tl.where(start == 0, 0.0, top - new_top)
        shrink = tl.exp2(shift)
        weighted = (weighted + total * shift) * shrink + tl.sum(exp_C * tl.where(inside_C, shifted_C, 0.0), axis=0)
        total = total * shrink + tl.sum(exp_C, axis=0)
        top = new_top
    total = tl.where(ignored, 1.0, total)
    log_total = tl.log2(total)
    partition = tl.where(ignored, 0.0, top + log_total)
    entropy = log_total - weighted / total
    here = target - first_column
    chosen = tl.load(logits_ptr + row * stride + here, mask=(here >= 0) & (here < end), other=0.0).to(tl.float32)
    chosen *= scale_log2
    if first_column > 0:
        before = tl.load(partition_ptr + row)
        entropy_before = tl.load(entropy_ptr + row) / LN_2
        highest = tl.maximum(before, partition)
        both = highest + tl.log2(tl.exp2(before - highest) + tl.exp2(partition - highest))
        share, share_before = tl.exp2(partition - both), tl.exp2(before - both)
        entropy = share * (entropy + both - partition) + share_before * (entropy_before + both - before)
        partition = both
        chosen += tl.load(chosen_ptr + row)
    tl.store(partition_ptr + row, partition)
    tl.store(chosen_ptr + row, chosen)
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, (partition - chosen) * LN_2))
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy * LN_2))


@triton.jit
def _gradient_kernel(
    logits_ptr,
    targets_ptr,
    partition_ptr,
    upstream_ptr,
    stride,
    columns,
    first_column,
    ignore_index,
    scale_log2,
    inverse_temperature,
    BLOCK_C: tl.constexpr,
):
    # One row a program: logits become their gradient where they are.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    partition = tl.load(partition_ptr + row)
    scale = tl.load(upstream_ptr + row).to(tl.float32) * inverse_temperature
    ignored = target == ignore_index
    here = target - first_column
    read = tl.where(ignored, 0, columns)
    for start in range(0, columns, BLOCK_C):
        column_C = start + tl.arange(0, BLOCK_C)
        pointer_C = logits_ptr + row * stride + column_C
        logit_C = tl.load(pointer_C, mask=column_C < read, other=0.0).to(tl.float32)
        share_C = tl.exp2(logit_C * scale_log2 - partition)
        grad_C = (share_C - tl.where(column_C == here, 1.0, 0.0)) * scale
        grad_C = tl.where(ignored, 0.0, grad_C)
        tl.store(pointer_C, grad_C.to(logits_ptr.dtype.element_ty), mask=column_C < columns)


def pieces(total: int, size: int) -> Iterator[slice]:
    """0 .. total in slices of `size`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def room(like: Tensor, rows: int, columns: int) -> Tensor:
    """A buffer for logits; `view_of` gives matrices of up to so many values whose rows are aligned."""
    return like.new_empty(rows * _aligned(columns))


def view_of(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix in the buffer."""
    return buffer[: rows * _aligned(columns)].view(rows, -1)[:, :columns]


def _aligned(columns: int) -> int:
    return triton.cdiv(columns, tiles.ALIGNMENT_BYTES) * tiles.ALIGNMENT_BYTES


def reduce_rows(
    logits_KC: Tensor,
    targets_K: Tensor,
    partition_K: Tensor,
    chosen_K: Tensor,
    loss_K: Tensor,
    entropy_K: Tensor,
    first_column: int,
    ignore_index: int,
    temperature: float,
) -> None:
    """Merge a slice of the vocabulary into log-partition (in powers of two), target's logit, loss and entropy."""
    rows, columns = logits_KC.shape
    block = min(2048, max(16, triton.next_power_of_2(columns)))
    _reduce_kernel[(rows,)](
        logits_KC,
        targets_K,
        partition_K,
        chosen_K,
        loss_K,
        entropy_K,
        logits_KC.stride(0),
        columns,
        first_column,
        ignore_index,
        LOG2_E / temperature,
        LN_2,
        BLOCK_C=block,
        num_warps=max(1, block // 1024),
    )


def gradient_rows(
    logits_KC: Tensor,
    targets_K: Tensor,
    partition_K: Tensor,
    upstream_K: Tensor,
    first_column: int,
    ignore_index: int,
    temperature: float,
) -> None:
    """Turn a slice's logits into their gradient, in place."""
    rows, columns = logits_KC.shape
    block = min(1024, max(16, triton.next_power_of_2(columns)))
    _gradient_kernel[(rows,)](
        logits_KC,
        targets_K,
        partition_K,
        upstream_K,
        logits_KC.stride(0),
        columns,
        first_column,
        ignore_index,
        LOG2_E / temperature,
        1 / temperature,
        BLOCK_C=block,
        num_warps=max(1, block // 256),
    )


def product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a · b, or out += a · b, summed in float32 whatever the dtypes."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        result = a.float() @ b.float()
        out.add_(result) if accumulate else out.copy_(result)


def _columns(tokens: int, vocabulary: int, itemsize: int) -> int:
    """How much of the vocabulary a slice has."""
    fits = BUFFER_BYTES // max(1, tokens * itemsize)
    return min(vocabulary, max(COLUMNS_MULTIPLE, fits // COLUMNS_MULTIPLE * COLUMNS_MULTIPLE))


@torch.library.custom_op("deepwright::linear_cross_entropy", mutates_args=())
def forward(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_T, entropy_T and the log-partition in powers of two."""
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    loss_T, entropy_T, partition_T, chosen_T = (hidden_TD.new_empty(tokens, dtype=torch.float32) for _ in range(4))
    targets_T = targets_T.contiguous()
    block = max(1, min(tokens, chunk or BLOCK_TOKENS))
    if tiles.fit(hidden_TD, weight_VD):
        columns = vocabulary if weight_VD.dtype == hidden_TD.dtype else CAST_COLUMNS
        for rows in pieces(tokens, block):
            count = rows.stop - rows.start
            partitions_NK, entropies_NK = hidden_TD.new_empty(
                2, tiles.across(vocabulary), count, dtype=torch.float32
            ).unbind()
            for part in pieces(vocabulary, columns):
                within = slice(part.start // tiles.BLOCK_C, tiles.across(part.stop))
                tiles.reduce(
                    hidden_TD[rows],
                    weight_VD[part].to(hidden_TD.dtype),
                    targets_T[rows],
                    part.start,
                    temperature,
                    partitions_NK[within],
                    entropies_NK[within],
                    chosen_T[rows],
                )
            tiles.combine(
                partitions_NK,
                entropies_NK,
                chosen_T[rows],
                targets_T[rows],
                ignore_index,
                partition_T[rows],
                loss_T[rows],
                entropy_T[rows],
            )
        return loss_T, entropy_T, partition_T
    columns = _columns(block, vocabulary, hidden_TD.itemsize)
    buffer = room(hidden_TD, block, columns)
    for part in pieces(vocabulary, columns):
        weight_CD = weight_VD[part].to(hidden_TD.dtype)
        for rows in pieces(tokens, block):
            logits_KC = view_of(buffer, rows.stop - rows.start, len(weight_CD))
            torch.mm(hidden_TD[rows], weight_CD.T, out=logits_KC)
            reduce_rows(
                logits_KC,
                targets_T[rows],
                partition_T[rows],
                chosen_T[rows],
                loss_T[rows],
                entropy_T[rows],
                part.start,
                ignore_index,
                temperature,
            )
    return loss_T, entropy_T, partition_T


@forward.register_fake
def _(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    loss_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=torch.float32)
    return loss_T, torch.empty_like(loss_T), torch.empty_like(loss_T)


@torch.library.custom_op("deepwright::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    partition_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    targets_T, grad_T = targets_T.contiguous(), grad_T.contiguous()
    block = max(1, min(tokens, chunk or BLOCK_TOKENS))
    columns = _columns(block, vocabulary, hidden_TD.itemsize)
    buffer = room(hidden_TD, block, columns)
    in_tiles = tiles.fit(hidden_TD, weight_VD)
    sums = hidden_TD.dtype if columns == vocabulary else torch.float32
    grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0, dtype=sums)
    grad_weight_VD = weight_VD.new_empty(weight_VD.shape if needs_weight else 0)
    if needs_weight and not tokens:
        grad_weight_VD.zero_()
    for part in pieces(vocabulary, columns):
        weight_CD = weight_VD[part].to(hidden_TD.dtype)
        grad_weight_CD = grad_weight_VD[part]
        if needs_weight and tokens > block and weight_VD.dtype != torch.float32:
            grad_weight_CD = grad_weight_CD.new_empty(grad_weight_CD.shape, dtype=torch.float32)
        for rows in pieces(tokens, block):
            hidden_KD = hidden_TD[rows]
            logits_KC = view_of(buffer, len(hidden_KD), len(weight_CD))
            known = (partition_T[rows], grad_T[rows])
            if in_tiles:
                tiles.gradient(
                    hidden_KD, weight_CD, targets_T[rows], part.start, ignore_index, temperature, *known, logits_KC
                )
            else:
                torch.mm(hidden_KD, weight_CD.T, out=logits_KC)
                gradient_rows(logits_KC, targets_T[rows], *known, part.start, ignore_index, temperature)
            if needs_hidden:
                product(grad_hidden_TD[rows], logits_KC, weight_CD, accumulate=part.start > 0)
            if needs_weight:
                product(grad_weight_CD, logits_KC.T, hidden_KD, accumulate=rows.start > 0)
        if needs_weight and tokens > block:
            grad_weight_VD[part] = grad_weight_CD
    return grad_hidden_TD.to(hidden_TD.dtype), grad_weight_VD


@_backward.register_fake
def _(
    grad_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    partition_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0),
        weight_VD.new_empty(weight_VD.shape if needs_weight else 0),
    )


def _keep(ctx, inputs, output) -> None:
    hidden_TD, weight_VD, targets_T, *ctx.constants = inputs
    ctx.save_for_backward(hidden_TD, weight_VD, targets_T, output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx, grad_T, _grad_entropy, _grad_partition):
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden_TD, grad_weight_VD = _backward(grad_T, *ctx.saved_tensors, *ctx.constants, needs_hidden, needs_weight)
    return grad_hidden_TD if needs_hidden else None, grad_weight_VD if needs_weight else None, None, None, None, None


forward.register_autograd(_gradients, setup_context=_keep)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss_T, entropy_T); see the operator's docstring."""
    loss_T, entropy_T, _ = forward(hidden_TD, weight_VD, targets_T, ignore_index, chunk, temperature)
    return loss_T, entropy_T
