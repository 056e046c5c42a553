"""Cross-entropy of a linear head that never holds all logits: a chunk of tokens at a time, computed again backwards.

What is kept for the backward pass is one number a token (the log of the partition sum). The gradient of a token's
loss with respect to its logits is (softmax − one-hot) / temperature, times whatever gradient arrives for that token:
so the caller may weigh every token as it likes, which RL's policy losses do.

Logits are computed in the dtype of `hidden` and summed in float32; the weight's gradient is accumulated in float32.
Leaves out: splitting the vocabulary over ranks.

Shapes: T tokens, D hidden size, V vocabulary, K tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Values of a chunk of logits. On a CPU a chunk should stay in the outer cache while it is read several times; on a
# GPU it must be large enough to fill the machine.
CPU_CHUNK_VALUES = 2**19
GPU_CHUNK_VALUES = 2**26


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """How many tokens to take at a time when the caller leaves it open."""
    values = CPU_CHUNK_VALUES if device.type == "cpu" else GPU_CHUNK_VALUES
    return max(16, values // max(1, vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        ignore_index: int,
        chunk: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        ctx.weight_dtype = weight_VD.dtype
        weight_VD = weight_VD.to(hidden_TD.dtype)
        ignored_T = targets_T == ignore_index
        safe_T = targets_T.masked_fill(ignored_T, 0)
        partition_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=wide)
        loss_T, entropy_T = torch.empty_like(partition_T), torch.empty_like(partition_T)
        for start in range(0, hidden_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_KV = _logits(hidden_TD[part], weight_VD, temperature, wide)
            chosen_K = logits_KV.gather(-1, safe_T[part, None])[:, 0]
            top_K1 = logits_KV.amax(-1, keepdim=True)
            logits_KV -= top_K1
            # exp in a second buffer: the entropy needs the logits beside it.
            exp_KV = logits_KV.exp()
            sum_K = exp_KV.sum(-1)
            log_sum_K = sum_K.log()
            partition_T[part] = log_sum_K + top_K1[:, 0]
            loss_T[part] = partition_T[part] - chosen_K
            entropy_T[part] = log_sum_K - torch.linalg.vecdot(exp_KV, logits_KV) / sum_K
        loss_T.masked_fill_(ignored_T, 0.0)
        entropy_T.masked_fill_(ignored_T, 0.0)
        ctx.save_for_backward(hidden_TD, weight_VD, safe_T, ignored_T, partition_T)
        ctx.chunk, ctx.temperature = chunk, temperature
        ctx.mark_non_differentiable(entropy_T)
        return loss_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, safe_T, ignored_T, partition_T = ctx.saved_tensors
        wide = partition_T.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        scale_T = grad_T.masked_fill(ignored_T, 0.0) / ctx.temperature
        for start in range(0, hidden_TD.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden_KD, scale_K1 = hidden_TD[part], scale_T[part, None]
            grad_KV = _logits(hidden_KD, weight_VD, ctx.temperature, wide)
            grad_KV.sub_(partition_T[part, None]).exp_().mul_(scale_K1)
            grad_KV.scatter_add_(-1, safe_T[part, None], -scale_K1)
            _products(grad_KV.to(hidden_TD.dtype), hidden_KD, weight_VD, grad_hidden_TD, part, grad_weight_VD)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


class _WeightedLinearCrossEntropy(torch.autograd.Function):
    """The weight of each token is known, so the gradients are made beside the loss: logits are computed once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        token_weights_T: Tensor,
        ignore_index: int,
        chunk: int,
        temperature: float,
    ) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        narrow_VD = weight_VD.to(hidden_TD.dtype)
        ignored_T = targets_T == ignore_index
        safe_T = targets_T.masked_fill(ignored_T, 0)
        token_weights_T = token_weights_T.to(wide).masked_fill(ignored_T, 0.0)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        loss = hidden_TD.new_zeros((), dtype=wide)
        for start in range(0, hidden_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden_KD, weights_K, target_K1 = hidden_TD[part], token_weights_T[part], safe_T[part, None]
            logits_KV = _logits(hidden_KD, narrow_VD, temperature, wide)
            partition_K1 = logits_KV.logsumexp(-1, keepdim=True)
            loss += (partition_K1 - logits_KV.gather(-1, target_K1))[:, 0] @ weights_K
            if not (needs_hidden or needs_weight):
                continue
            scale_K1 = weights_K[:, None] / temperature
            grad_KV = logits_KV.sub_(partition_K1).exp_().mul_(scale_K1)
            grad_KV.scatter_add_(-1, target_K1, -scale_K1)
            _products(grad_KV.to(hidden_TD.dtype), hidden_KD, narrow_VD, grad_hidden_TD, part, grad_weight_VD)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: another gradient of the weight's size would be the largest tensor of all. A second backward pass
        # is refused by autograd, which sees that what was saved has changed.
        scaled = [None if gradient is None else gradient.mul_(grad) for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


def _products(
    grad_KV: Tensor,
    hidden_KD: Tensor,
    weight_VD: Tensor,
    grad_hidden_TD: Tensor | None,
    part: slice,
    grad_weight_VD: Tensor | None,
) -> None:
    """The gradient of a chunk's logits to those of its hidden states and, added up, of the weight."""
    if grad_hidden_TD is not None:
        torch.mm(grad_KV, weight_VD, out=grad_hidden_TD[part])
    if grad_weight_VD is not None:
        if grad_KV.dtype == grad_weight_VD.dtype:
            grad_weight_VD.addmm_(grad_KV.T, hidden_KD)
        else:
            grad_weight_VD += grad_KV.T @ hidden_KD


def _logits(hidden_KD: Tensor, weight_VD: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    logits_KV = (hidden_KD @ weight_VD.T).to(wide)
    return logits_KV if temperature == 1.0 else logits_KV.div_(temperature)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss_T, entropy_T); see the operator's docstring."""
    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    chunk = chunk or chunk_tokens(vocabulary, hidden_TD.device)
    if hidden_TD.device.type != "cpu":
        return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, ignore_index, chunk, temperature)
    # On the CPU, where nobody waits for a device, ignored tokens (prompts, padding) are left out of the products.
    kept_K = (targets_T != ignore_index).nonzero()[:, 0]
    if kept_K.numel() == tokens:
        return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, ignore_index, chunk, temperature)
    loss_K, entropy_K = _LinearCrossEntropy.apply(
        hidden_TD[kept_K], weight_VD, targets_T[kept_K], ignore_index, chunk, temperature
    )
    loss_T = loss_K.new_zeros(tokens).index_copy(0, kept_K, loss_K)
    return loss_T, entropy_K.new_zeros(tokens).index_copy(0, kept_K, entropy_K)


def weighted_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Σ_t token_weight_t · loss_t; see the operator's docstring."""
    chunk = chunk_tokens(weight_VD.shape[0], hidden_TD.device)
    if hidden_TD.device.type == "cpu":
        kept_K = (targets_T != ignore_index).nonzero()[:, 0]
        if kept_K.numel() < targets_T.numel():
            hidden_TD, targets_T, token_weights_T = hidden_TD[kept_K], targets_T[kept_K], token_weights_T[kept_K]
    return _WeightedLinearCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, token_weights_T, ignore_index, chunk, temperature
    )
