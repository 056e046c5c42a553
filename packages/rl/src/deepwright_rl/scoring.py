"""Log-probabilities of given tokens under a model, at the temperature they were sampled with.

Shapes: B samples, S token positions, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from deepwright_core.model.record import ForwardRecord
from deepwright_core.model.transformer import Transformer
from deepwright_core.training.objective import IGNORED
from deepwright_kernels import linear_cross_entropy

from .rollout import ScoredTokens


def token_logps(
    model: Transformer, batch: ScoredTokens, temperature: float, record: ForwardRecord | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability (differentiable) and entropy of each completion token, float32 [B, S], 0 elsewhere."""
    hidden_BSD = model(batch.tokens_BS1[:, :-1], None, record)
    targets_BS = batch.tokens_BS1[:, 1:].masked_fill(~batch.mask_BS, IGNORED)
    loss_T, entropy_T = linear_cross_entropy(
        hidden_BSD.flatten(0, 1), model.head.weight, targets_BS.flatten(), IGNORED, temperature=temperature
    )
    return -loss_T.view_as(targets_BS), entropy_T.view_as(targets_BS)
