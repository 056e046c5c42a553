"""A model learns more tokens: its embedding and its head get rows for ids that it has not had so far.

The new rows are the mean of the old ones. A new token then says nothing in particular to the model, and its logit lies
where an average token's does, while random rows would draw probability at once or be far from every hidden state.

Shapes: V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .transformer import Transformer


@torch.no_grad()
def grow_vocabulary(model: Transformer, vocab_size: int) -> int:
    """Give the model rows for `vocab_size` ids, if it has fewer; returns how many are new."""
    new = vocab_size - model.config.vocab_size
    if new <= 0:
        return 0
    model.embedding = nn.Embedding.from_pretrained(_with_mean_rows(model.embedding.weight, new), freeze=False)
    if model.config.tied_head:
        model.head.weight = model.embedding.weight
    else:
        model.head.weight = nn.Parameter(_with_mean_rows(model.head.weight, new))
    model.head.out_features = vocab_size
    model.config = model.config.model_copy(update={"vocab_size": vocab_size})
    return new


def _with_mean_rows(weight_VD: Tensor, new: int) -> Tensor:
    # Summed in float64: the result does not depend on how many threads add up.
    mean_D = (weight_VD.sum(0, dtype=torch.float64) / len(weight_VD)).to(weight_VD.dtype)
    return torch.cat([weight_VD, mean_D.expand(new, -1)])
