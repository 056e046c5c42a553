"""Cross-entropy of a linear head: per-token loss and entropy without holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, in_autocast_dtype, require, require_device, require_dtype, require_shape

NAME = "linear_cross_entropy"
dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:linear_cross_entropy",
        "torch": f"{__name__}.chunked:linear_cross_entropy",
        "triton": f"{__name__}.triton:linear_cross_entropy",
    },
    cuda=("triton", "torch"),
    elsewhere=("torch",),
)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Per-token loss of softmax(hidden · weightᵀ / temperature) and the entropy of that distribution.

    hidden_TD [T, D], weight_VD [V, D], targets_T [T] -> (loss_T, entropy_T), float32 [T], both 0 where the target is
    `ignore_index`. The loss has gradients for hidden and weight from any upstream gradient; minus the loss is the
    log-probability of the target. The entropy has no gradient. Products are made in hidden's dtype, `chunk` tokens at
    a time (None: chosen by device).
    """
    (hidden_TD,) = in_autocast_dtype(hidden_TD)
    require_shape(NAME, "hidden_TD", hidden_TD, (None, None), "[T, D]")
    require_dtype(NAME, "hidden_TD", hidden_TD, FLOATS)
    require_shape(NAME, "weight_VD", weight_VD, (None, hidden_TD.shape[1]), "[V, D]")
    require_dtype(NAME, "weight_VD", weight_VD, FLOATS)
    require_shape(NAME, "targets_T", targets_T, (hidden_TD.shape[0],), "[T]")
    require_dtype(NAME, "targets_T", targets_T, (torch.int64,))
    require_device(NAME, "weight_VD", weight_VD, hidden_TD.device)
    require_device(NAME, "targets_T", targets_T, hidden_TD.device)
    require(weight_VD.shape[0] > 0, NAME, "weight_VD", "has no rows; expected one for each word of the vocabulary")
    require(chunk is None or chunk > 0, NAME, "chunk", f"is {chunk}; expected a positive number of tokens or None")
    require(temperature > 0, NAME, "temperature", f"is {temperature}; expected a positive number")
    loss_T, entropy_T = dispatch.run(NAME, hidden_TD, weight_VD, targets_T, ignore_index, chunk, temperature)
    return loss_T, entropy_T
