"""Cross-entropy of a linear head: per-token loss and entropy, or a weighted sum, without holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, in_autocast_dtype, require, require_device, require_dtype, require_shape

NAME, WEIGHTED = "linear_cross_entropy", "weighted_linear_cross_entropy"
for name, kernels in ((NAME, "triton"), (WEIGHTED, "weighted_triton")):
    dispatch.operator(
        name,
        {
            "reference": f"{__name__}.reference:{name}",
            "torch": f"{__name__}.chunked:{name}",
            "triton": f"{__name__}.{kernels}:{name}",
        },
        cuda=("triton", "torch"),
        elsewhere=("torch",),
    )


def _check(operator: str, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float) -> None:
    require_shape(operator, "hidden_TD", hidden_TD, (None, None), "[T, D]")
    require_dtype(operator, "hidden_TD", hidden_TD, FLOATS)
    require_shape(operator, "weight_VD", weight_VD, (None, hidden_TD.shape[1]), "[V, D]")
    require_dtype(operator, "weight_VD", weight_VD, FLOATS)
    require_shape(operator, "targets_T", targets_T, (hidden_TD.shape[0],), "[T]")
    require_dtype(operator, "targets_T", targets_T, (torch.int64,))
    require_device(operator, "weight_VD", weight_VD, hidden_TD.device)
    require_device(operator, "targets_T", targets_T, hidden_TD.device)
    require(weight_VD.shape[0] > 0, operator, "weight_VD", "has no rows; expected one for each word of the vocabulary")
    require(temperature > 0, operator, "temperature", f"is {temperature}; expected a positive number")


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast has been followed in what the hidden states are; the sums behind the products have to stay float32, and
    the backward pass, which it does not reach, has to repeat the same products."""
    return torch.autocast(tensor.device.type, enabled=False)


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
    _check(NAME, hidden_TD, weight_VD, targets_T, temperature)
    require(chunk is None or chunk > 0, NAME, "chunk", f"is {chunk}; expected a positive number of tokens or None")
    with _without_autocast(hidden_TD):
        loss_T, entropy_T = dispatch.run(NAME, hidden_TD, weight_VD, targets_T, ignore_index, chunk, temperature)
    return loss_T, entropy_T


def weighted_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:
    """Σ_t token_weight_t · loss_t over the tokens whose target is not `ignore_index`, a float32 number.

    Arguments as for `linear_cross_entropy`; token_weights_T [T] in any float dtype, 1/T for a mean. Because the weights
    are known beforehand, the gradients for hidden and weight are made with the loss, from logits that are computed
    once: three products where `linear_cross_entropy` needs four. Only one backward pass can be made. The token weights
    get no gradient.
    """
    (hidden_TD,) = in_autocast_dtype(hidden_TD)
    _check(WEIGHTED, hidden_TD, weight_VD, targets_T, temperature)
    require_shape(WEIGHTED, "token_weights_T", token_weights_T, (hidden_TD.shape[0],), "[T]")
    require_dtype(WEIGHTED, "token_weights_T", token_weights_T, FLOATS)
    require_device(WEIGHTED, "token_weights_T", token_weights_T, hidden_TD.device)
    with _without_autocast(hidden_TD):
        loss: Tensor = dispatch.run(
            WEIGHTED, hidden_TD, weight_VD, targets_T, token_weights_T.detach(), ignore_index, temperature
        )
    return loss
