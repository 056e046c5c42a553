"""The weighted sum of a linear head's losses with its gradients made in the forward pass: three products, not four.

When the weight of every token is known beforehand, nothing has to wait for the backward pass: the logits of a block of
tokens are made over the whole vocabulary, one pass turns them in place into their gradient, and the products for the
gradients of hidden states and weight follow at once. The backward pass multiplies by one number. The pass reads a row
twice, the second time from the L2: a program has an SM for itself, so that all rows under way fit there.

The gradient of the weight is summed over blocks of tokens in the weight's own dtype (inside a block in float32): in
bfloat16 that adds a rounding for each block. A weight in another dtype than the hidden states is cast as a whole.

Leaves out: as `triton.py`, and the entropy.

Shapes: T tokens, D hidden size, V vocabulary, K tokens of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton import LOG2_E, _forward, _pieces, _product

# The buffer that holds the logits of a block of tokens.
BUFFER_BYTES = 2**29
TOKENS_MULTIPLE = 128


@triton.jit
def _loss_and_gradient_kernel(
    logits_ptr,
    targets_ptr,
    token_weights_ptr,
    loss_ptr,
    columns,
    ignore_index,
    scale_log2,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    # One row a program, in powers of two until the results are written.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    weight = tl.load(token_weights_ptr + row).to(tl.float32)
    read = tl.where(ignored, 0, columns)
    row_ptr = logits_ptr + row * columns
    top = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for start in range(0, read, BLOCK_V):
        column_V = start + tl.arange(0, BLOCK_V)
        logit_V = tl.load(row_ptr + column_V, mask=column_V < columns, other=float("-inf")).to(tl.float32)
        logit_V *= scale_log2
        new_top = tl.maximum(top, tl.max(logit_V, axis=0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logit_V - new_top), axis=0)
        top = new_top
    partition = tl.where(ignored, 0.0, top + tl.log2(tl.where(ignored, 1.0, total)))
    chosen = tl.load(row_ptr + target, mask=(target >= 0) & (target < read), other=0.0).to(tl.float32) * scale_log2
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, (partition - chosen) * weight))
    scale = weight * inverse_temperature
    for start in range(0, columns, BLOCK_V):
        column_V = start + tl.arange(0, BLOCK_V)
        logit_V = tl.load(row_ptr + column_V, mask=column_V < read, other=0.0).to(tl.float32)
        share_V = tl.exp2(logit_V * scale_log2 - partition)
        grad_V = (share_V - tl.where(column_V == target, 1.0, 0.0)) * scale
        grad_V = tl.where(ignored, 0.0, grad_V)
        tl.store(row_ptr + column_V, grad_V.to(logits_ptr.dtype.element_ty), mask=column_V < columns)


def _block(tokens: int, vocabulary: int, itemsize: int) -> int:
    """How many tokens to take at a time."""
    fits = BUFFER_BYTES // (vocabulary * itemsize)
    return max(1, min(tokens, max(TOKENS_MULTIPLE, fits // TOKENS_MULTIPLE * TOKENS_MULTIPLE)))


@torch.library.custom_op("deepwright::weighted_linear_cross_entropy", mutates_args=())
def _with_gradients(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    ignore_index: int,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    targets_T, token_weights_T = targets_T.contiguous(), token_weights_T.contiguous()
    loss_T = hidden_TD.new_empty(tokens, dtype=torch.float32)
    grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0)
    grad_weight_VD = weight_VD.new_empty(weight_VD.shape if needs_weight else 0)
    if not tokens:
        grad_weight_VD.zero_()
    weight_VD = weight_VD.to(hidden_TD.dtype)
    block = _block(tokens, vocabulary, hidden_TD.itemsize)
    buffer = hidden_TD.new_empty(block * vocabulary)
    columns = min(32768, max(16, triton.next_power_of_2(vocabulary)))
    for rows in _pieces(tokens, block):
        hidden_KD = hidden_TD[rows]
        logits_KV = buffer[: len(hidden_KD) * vocabulary].view(-1, vocabulary)
        torch.mm(hidden_KD, weight_VD.T, out=logits_KV)
        _loss_and_gradient_kernel[(len(hidden_KD),)](
            logits_KV,
            targets_T[rows],
            token_weights_T[rows],
            loss_T[rows],
            vocabulary,
            ignore_index,
            LOG2_E / temperature,
            1 / temperature,
            BLOCK_V=columns,
            num_warps=max(1, columns // 1024),
        )
        if needs_hidden:
            torch.mm(logits_KV, weight_VD, out=grad_hidden_TD[rows])
        if needs_weight:
            _product(grad_weight_VD, logits_KV.T, hidden_KD, accumulate=rows.start > 0)
    return loss_T.sum() / LOG2_E, grad_hidden_TD, grad_weight_VD


@_with_gradients.register_fake
def _(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    ignore_index: int,
    temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden_TD.new_empty((), dtype=torch.float32),
        hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0),
        weight_VD.new_empty(weight_VD.shape if needs_weight else 0),
    )


class _WeightedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        token_weights_T: Tensor,
        ignore_index: int,
        temperature: float,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:2]
        loss, grad_hidden_TD, grad_weight_VD = _with_gradients(
            hidden_TD, weight_VD, targets_T, token_weights_T, ignore_index, temperature, *needs
        )
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second gradient of the weight's size would be the largest tensor of all. A second backward pass
        # is refused by autograd, which sees that what was saved has changed.
        scaled = [
            gradient.mul_(grad) if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ]
        return *scaled, None, None, None, None


def weighted_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Σ_t weight_t · loss_t; see the operator's docstring."""
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        return _WeightedLinearCrossEntropy.apply(
            hidden_TD, weight_VD, targets_T, token_weights_T, ignore_index, temperature
        )
    loss_T, _, _ = _forward(hidden_TD, weight_VD, targets_T, ignore_index, None, temperature)
    return (loss_T * token_weights_T).sum()
