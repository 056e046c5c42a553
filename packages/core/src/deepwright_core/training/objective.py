"""The language-model objective: next token, plus multi-token prediction (DeepSeek-V3 report, eq. 24-25).

Documents packed into one row never predict each other: a target in another document than its input is ignored.

Shapes: B rows, S inputs of each (S + 1 tokens), D hidden, T = B·S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepwright_kernels import weighted_linear_cross_entropy

from ..model.record import ForwardRecord
from ..model.transformer import Transformer

IGNORED = -100


@dataclass(frozen=True)
class Loss:
    """total: what to differentiate. next_token and further (MTP): the parts, detached, in nats per token."""

    total: Tensor
    next_token: Tensor
    further: Tensor | None
    record: ForwardRecord

    def scaled(self, share: float) -> Loss:
        """The same with `total` weighted, for a micro-batch that is a share of its batch."""
        return replace(self, total=self.total * share)


def targets_at(tokens_BS1: Tensor, segments_BS1: Tensor | None, trained_BS1: Tensor | None, distance: int) -> Tensor:
    """Target `distance` tokens ahead for each input, [B, S + 1 - distance]; IGNORED across documents or untrained."""
    targets = tokens_BS1[:, distance:]
    if segments_BS1 is not None:
        same = segments_BS1[:, distance:] == segments_BS1[:, : segments_BS1.shape[1] - distance]
        targets = targets.masked_fill(~same, IGNORED)
    if trained_BS1 is not None:
        targets = targets.masked_fill(~trained_BS1[:, distance:], IGNORED)
    return targets


def mean_loss(model: Transformer, hidden_BSD: Tensor, targets_BS: Tensor, count: Tensor | None = None) -> Tensor:
    """Cross-entropy of a hidden against its targets, over `count` tokens (default: those not ignored); 0 if none."""
    count = (targets_BS != IGNORED).sum() if count is None else count
    share = 1 / count.clamp(min=1e-9).to(torch.float32)  # a micro-batch's share of a count may lie below 1
    return weighted_linear_cross_entropy(
        hidden_BSD.flatten(0, 1), model.head.weight, targets_BS.flatten(), share.expand(targets_BS.numel()), IGNORED
    )


def count_targets(
    model: Transformer, tokens_BS1: Tensor, segments_BS1: Tensor | None = None, trained_BS1: Tensor | None = None
) -> list[Tensor]:
    """How many targets a batch has, for the next token and for each MTP module."""
    distances = range(1, 2 + model.config.mtp.depth)
    return [(targets_at(tokens_BS1, segments_BS1, trained_BS1, distance) != IGNORED).sum() for distance in distances]


def language_model_loss(
    model: Transformer,
    tokens_BS1: Tensor,
    segments_BS1: Tensor | None = None,
    trained_BS1: Tensor | None = None,
    real_BS1: Tensor | None = None,
    counts: Sequence[Tensor] | None = None,
) -> Loss:
    """Loss of a batch of rows.

    segments_BS1 numbers the packed documents. trained_BS1 marks the tokens that are targets (default all).
    real_BS1 marks tokens that are no padding. counts: how many targets to average over (default: those of these rows).
    One of `parts` micro-batches is given `count_targets` of the whole batch over `parts`, and its loss is
    `scaled(1 / parts)`: then it makes no difference that rows have different numbers of targets.
    """
    counts = counts or count_targets(model, tokens_BS1, segments_BS1, trained_BS1)
    inputs_BS = tokens_BS1[:, :-1]
    segments_BS = None if segments_BS1 is None else segments_BS1[:, :-1]
    record = ForwardRecord(None if real_BS1 is None else real_BS1[:, :-1])
    hidden_BSD = model(inputs_BS, segments_BS, record)
    next_token = mean_loss(model, hidden_BSD, targets_at(tokens_BS1, segments_BS1, trained_BS1, 1), counts[0])
    total = next_token + sum(record.losses.values(), torch.zeros((), device=next_token.device))
    further = None
    depths = model.config.mtp.depth
    for depth in range(depths):
        length = tokens_BS1.shape[1] - 2 - depth
        record.real_BS = None if real_BS1 is None else real_BS1[:, :length]
        hidden_BSD = model.predict_further(
            hidden_BSD[:, :length],
            tokens_BS1[:, depth + 1 : depth + 1 + length],
            depth,
            None if segments_BS is None else segments_BS[:, :length],
            record,
        )
        targets_BS = targets_at(tokens_BS1, segments_BS1, trained_BS1, 2 + depth)
        loss = mean_loss(model, hidden_BSD, targets_BS, counts[1 + depth])
        total = total + model.config.mtp.loss_weight / depths * loss
        total = total + record.losses.get(model.config.layers + depth, 0.0)
        further = loss.detach() / depths + (further if further is not None else 0.0)
    return Loss(total, next_token.detach(), further, record)
