"""Cross-entropy of a linear head in slices of the vocabulary: products by cuBLAS, one Triton pass over each slice.

Forward, the logits of a slice of the vocabulary are made in a buffer, and one pass reads them once: for each token it
merges the slice's log-partition and entropy into those of the slices before. Kept for the backward pass is one number
a token, the log-partition. Backward, the logits are made again, one pass turns them in place into their gradient
(softmax − one-hot) · upstream / temperature, and two products follow. Because all tokens of a block see a slice at
once, the slice's gradient of the weight is a single product, rounded once; only the gradient of the hidden states is
summed over slices, in float32. A weight in another dtype than the hidden states is cast slice by slice.

Leaves out: splitting the vocabulary over ranks, and leaving out tokens that are ignored (their rows of the products
are made and multiplied by zero: how many there are, the host would have to wait for).

Shapes: T tokens, D hidden size, V vocabulary, K tokens of a block, C columns of a slice of the vocabulary.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens that share a product. More would not make products faster, only slices narrower.
BLOCK_TOKENS = 16384
# The buffer that holds the logits of a block of tokens and a slice of the vocabulary.
BUFFER_BYTES = 2**28
# A slice's columns are a multiple of this, so that rows start at full cache lines and tiles are full.
COLUMNS_MULTIPLE = 256
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@triton.jit
def _reduce_kernel(
    logits_ptr,
    targets_ptr,
    partition_ptr,
    chosen_ptr,
    loss_ptr,
    entropy_ptr,
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
        logit_C = tl.load(logits_ptr + row * columns + column_C, mask=inside_C, other=float("-inf")).to(tl.float32)
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
    chosen = tl.load(logits_ptr + row * columns + here, mask=(here >= 0) & (here < end), other=0.0).to(tl.float32)
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
        inside_C = column_C < columns
        pointer_C = logits_ptr + row * columns + column_C
        logit_C = tl.load(pointer_C, mask=column_C < read, other=0.0).to(tl.float32)
        share_C = tl.exp2(logit_C * scale_log2 - partition)
        grad_C = (share_C - tl.where(column_C == here, 1.0, 0.0)) * scale
        grad_C = tl.where(ignored, 0.0, grad_C)
        tl.store(pointer_C, grad_C.to(logits_ptr.dtype.element_ty), mask=inside_C)


def _pieces(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _columns(tokens: int, vocabulary: int, itemsize: int) -> int:
    """How much of the vocabulary a slice has."""
    fits = BUFFER_BYTES // max(1, tokens * itemsize)
    return min(vocabulary, max(COLUMNS_MULTIPLE, fits // COLUMNS_MULTIPLE * COLUMNS_MULTIPLE))


def _launch(columns: int) -> dict[str, int]:
    block = min(2048, max(16, triton.next_power_of_2(columns)))
    return {"BLOCK_C": block, "num_warps": max(1, block // 512)}


def _product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a · b, or out += a · b, summed in float32 whatever the dtypes."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        product = a.float() @ b.float()
        out.add_(product) if accumulate else out.copy_(product)


@torch.library.custom_op("deepwright::linear_cross_entropy", mutates_args=())
def _forward(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    loss_T, entropy_T, partition_T, chosen_T = (hidden_TD.new_empty(tokens, dtype=torch.float32) for _ in range(4))
    targets_T = targets_T.contiguous()
    block = max(1, min(tokens, chunk or BLOCK_TOKENS))
    columns = _columns(block, vocabulary, hidden_TD.itemsize)
    buffer = hidden_TD.new_empty(block * columns)
    for part in _pieces(vocabulary, columns):
        weight_CD = weight_VD[part].to(hidden_TD.dtype)
        width = len(weight_CD)
        for rows in _pieces(tokens, block):
            hidden_KD = hidden_TD[rows]
            logits_KC = buffer[: len(hidden_KD) * width].view(-1, width)
            torch.mm(hidden_KD, weight_CD.T, out=logits_KC)
            _reduce_kernel[(len(hidden_KD),)](
                logits_KC,
                targets_T[rows],
                partition_T[rows],
                chosen_T[rows],
                loss_T[rows],
                entropy_T[rows],
                width,
                part.start,
                ignore_index,
                LOG2_E / temperature,
                LN_2,
                **_launch(width),
            )
    return loss_T, entropy_T, partition_T


@_forward.register_fake
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
    buffer = hidden_TD.new_empty(block * columns)
    sums = hidden_TD.dtype if columns == vocabulary else torch.float32
    grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0, dtype=sums)
    grad_weight_VD = weight_VD.new_empty(weight_VD.shape if needs_weight else 0)
    if needs_weight and not tokens:
        grad_weight_VD.zero_()
    for part in _pieces(vocabulary, columns):
        weight_CD = weight_VD[part].to(hidden_TD.dtype)
        width = len(weight_CD)
        grad_weight_CD = grad_weight_VD[part]
        if needs_weight and tokens > block and weight_VD.dtype != torch.float32:
            grad_weight_CD = grad_weight_CD.new_empty(grad_weight_CD.shape, dtype=torch.float32)
        for rows in _pieces(tokens, block):
            hidden_KD = hidden_TD[rows]
            logits_KC = buffer[: len(hidden_KD) * width].view(-1, width)
            torch.mm(hidden_KD, weight_CD.T, out=logits_KC)
            _gradient_kernel[(len(hidden_KD),)](
                logits_KC,
                targets_T[rows],
                partition_T[rows],
                grad_T[rows],
                width,
                part.start,
                ignore_index,
                LOG2_E / temperature,
                1 / temperature,
                **_launch(width),
            )
            if needs_hidden:
                _product(grad_hidden_TD[rows], logits_KC, weight_CD, accumulate=part.start > 0)
            if needs_weight:
                _product(grad_weight_CD, logits_KC.T, hidden_KD, accumulate=rows.start > 0)
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


_forward.register_autograd(_gradients, setup_context=_keep)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss_T, entropy_T); see the operator's docstring."""
    loss_T, entropy_T, _ = _forward(hidden_TD, weight_VD, targets_T, ignore_index, chunk, temperature)
    return loss_T, entropy_T
