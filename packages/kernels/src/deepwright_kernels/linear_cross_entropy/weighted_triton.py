"""The weighted sum of a linear head's losses with its gradients made in the forward pass: three products, not four.

When the weight of every token is known beforehand, nothing has to wait for the backward pass: the logits of a block of
tokens are made over the whole vocabulary, one pass takes each row's log-partition, another turns them in place into
their gradient, and the products for the gradients of hidden states and weight follow at once. The backward pass
multiplies by one number.

The gradient of the weight is summed over blocks of tokens in the weight's own dtype (inside a block in float32): in
bfloat16 that adds a rounding for each block. A weight in another dtype than the hidden states is cast as a whole.

Leaves out: what `triton.py` does, and the entropy.

Shapes: T tokens, D hidden size, V vocabulary, K tokens of a block.
"""

from typing import Any

import torch
from torch import Tensor

from .triton import forward, gradient_rows, pieces, product, reduce_rows, room, view_of

# The buffer that holds the logits of a block of tokens. With DeepSeek's vocabulary that is 2048 tokens in bfloat16: the
# product for the gradient of 2048 hidden states of width 2048 has 128 tiles, which nearly fill the 132 SMs of an H200.
BUFFER_BYTES = 2**29
TOKENS_MULTIPLE = 128


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
    grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0)
    grad_weight_VD = weight_VD.new_empty(weight_VD.shape if needs_weight else 0)
    if not tokens:
        grad_weight_VD.zero_()
    weight_VD = weight_VD.to(hidden_TD.dtype)
    block = _block(tokens, vocabulary, hidden_TD.itemsize)
    buffer = room(hidden_TD, block, vocabulary)
    scratch = [hidden_TD.new_empty(block, dtype=torch.float32) for _ in range(4)]
    loss = hidden_TD.new_zeros((), dtype=torch.float32)
    for rows in pieces(tokens, block):
        hidden_KD, targets_K, weights_K = hidden_TD[rows], targets_T[rows], token_weights_T[rows]
        partition_K, chosen_K, loss_K, entropy_K = (vector[: len(hidden_KD)] for vector in scratch)
        logits_KV = view_of(buffer, len(hidden_KD), vocabulary)
        torch.mm(hidden_KD, weight_VD.T, out=logits_KV)
        reduce_rows(logits_KV, targets_K, partition_K, chosen_K, loss_K, entropy_K, 0, ignore_index, temperature)
        loss += loss_K @ weights_K.to(torch.float32)
        gradient_rows(logits_KV, targets_K, partition_K, weights_K, 0, ignore_index, temperature)
        if needs_hidden:
            torch.mm(logits_KV, weight_VD, out=grad_hidden_TD[rows])
        if needs_weight:
            product(grad_weight_VD, logits_KV.T, hidden_KD, accumulate=rows.start > 0)
    return loss, grad_hidden_TD, grad_weight_VD


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
    loss_T, _, _ = forward(hidden_TD, weight_VD, targets_T, ignore_index, None, temperature)
    return loss_T @ token_weights_T.to(torch.float32)
