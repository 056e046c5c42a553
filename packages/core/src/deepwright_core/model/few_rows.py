"""A decode step of a small model on a CPU, in as few calls of torch as it takes.

There a step spends its time in calls and not in products. So matrices are put together beforehand (joined, absorbed,
transposed), what all layers need is made once a step, and nothing is asked again that was settled when the form was
made. It is made of the weights as they are: whoever changes them, or adds to what a layer does, makes it anew (the
engine does). What the layers' own `extend` and `forward` compute is the specification, and what runs for all other
calls. Left out: GPUs, where kernels and graphs do that work; gradients; dtypes other than float32; MTP modules.

A layer takes part by a method `few_rows_form`, which gives a function or None; one without is called as it is.

Shapes: B sequences, Q new tokens of each, T = B * Q, D hidden, V vocabulary, N cache slots, W cache width, F rope
pairs, K = P * block_size keys of the longest sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from deepwright_kernels.dispatch import by_itself

from .cache import CacheBatch
from .norm import RMSNorm

if TYPE_CHECKING:
    from .attention import Attention, Rope
    from .feed_forward import FeedForward
    from .transformer import Block, Transformer

MOST_ROWS = 256
"""With more rows the products are what takes time, and absorbed matrices make more of them."""
MOST_VALUES = 1 << 20
"""Of a layer's matrices that are held a second time; reading more than these takes longer than the calls saved."""


@dataclass(frozen=True)
class Shared:
    """What all layers of a step have in common."""

    rope: Rope
    batch: CacheBatch

    @cached_property
    def turns_T1F(self) -> Tensor:
        """The angles as complex numbers of length one (or of YaRN's)."""
        return torch.complex(*self.rope).flatten(0, 1).unsqueeze_(1)

    @cached_property
    def slots_T(self) -> Tensor:
        """Where each token is cached."""
        return self.batch.slots_BQ.flatten()

    @cached_property
    def unseen_BQK(self) -> Tensor:
        """To be added to scores: 0 for a key that a token sees, -inf for those after it or beyond its sequence."""
        batch = self.batch
        last_BQ = torch.minimum(batch.positions_BQ, batch.lengths_B[:, None] - 1)
        beyond_BQK = torch.arange(batch.context) > last_BQ[:, :, None]
        return torch.zeros(beyond_BQK.shape).masked_fill_(beyond_BQK, -torch.inf)


AttentionForm = Callable[[Tensor, Tensor, Shared], Tensor]
"""x_TD, cache_NW, shared -> out_TD; caches the new tokens. May give no numbers where the layer's own form does."""
FeedForwardForm = Callable[[Tensor], Tensor]
"""x_TD -> out_TD."""


class FewRowsNorm:
    """An RMSNorm in five calls. Numbers that tensors are added to or multiplied by cost more than small tensors."""

    def __init__(self, norm: RMSNorm) -> None:
        self._weight_D = norm.weight.detach()
        self._eps_1 = torch.full((1,), norm.eps)
        self._share = 1.0 / len(self._weight_D)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return (x_TD * self._scale(x_TD)).mul_(self._weight_D)

    def in_place(self, x_TD: Tensor) -> None:
        """Norm x itself."""
        x_TD.mul_(self._scale(x_TD)).mul_(self._weight_D)

    def _scale(self, x_TD: Tensor) -> Tensor:
        length_T1 = torch.linalg.vector_norm(x_TD, 2, -1, True)
        return torch.addcmul(self._eps_1, length_T1, length_T1, value=self._share).rsqrt_()


class _Layer(NamedTuple):
    attention_norm: FewRowsNorm
    attention: AttentionForm
    ffn_norm: FewRowsNorm
    ffn: FeedForwardForm


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is torch's own linear layer without bias."""
    return type(layer) is nn.Linear and layer.bias is None


def transposed(*weights_NK: Tensor) -> Tensor:
    """Weights [out, in], one below the other, as one matrix [in, out]: a CPU multiplies by that faster."""
    return torch.cat(weights_NK).T.contiguous()


def form_of(part: object) -> Any:
    """What an optional method `few_rows_form` of a model or a layer gives; None where there is none."""
    make = getattr(part, "few_rows_form", None)
    return None if make is None else make()


def as_it_is(attention: nn.Module) -> AttentionForm:
    """An attention's `extend` as a form."""
    extend = cast("Attention", attention).extend

    def form(x_TD: Tensor, cache_NW: Tensor, shared: Shared) -> Tensor:
        x_BQD = x_TD.view(*shared.batch.positions_BQ.shape, -1)
        return extend(x_BQD, shared.rope, cache_NW, shared.batch).flatten(0, 1)

    return form


def _all_at_once(ffn: nn.Module) -> FeedForwardForm:
    """A feed-forward's `forward` as a form."""
    return lambda x_TD: cast("FeedForward", ffn).forward(x_TD[:, None], None)[:, 0]


class FewRows:
    """`extend` and `logits` of a model, for few rows."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._embedding, self._rotary = model.embedding.weight.detach(), model.rotary
        self._layers = []
        for layer in model.layers:
            block = cast("Block", layer)
            attention: AttentionForm = form_of(block.attention) or as_it_is(block.attention)
            ffn: FeedForwardForm = form_of(block.ffn) or _all_at_once(block.ffn)
            norms = FewRowsNorm(block.attention_norm), FewRowsNorm(block.ffn_norm)
            self._layers.append(_Layer(norms[0], attention, norms[1], ffn))
        self._norm = FewRowsNorm(model.norm)
        self._head_DV = None
        if is_plain(model.head) and model.head.weight.numel() <= MOST_VALUES:
            self._head_DV = transposed(model.head.weight)

    @staticmethod
    def takes(rows: int) -> bool:
        """Whether a step of so many rows goes this way now. Not where backends were chosen for operators, or something
        is put in their place: most of the step goes past them."""
        return rows <= MOST_ROWS and by_itself() and not torch.is_autocast_enabled("cpu")

    def extend(self, tokens_BQ: Tensor, cache: list[Tensor], batch: CacheBatch) -> Tensor:
        """As `Transformer.extend`.

        Where that gives numbers the forms may not: a weight of zero does not silence what is none, in a block beyond
        its sequence or in an expert that was not chosen. So the result is looked at, and then the model does it.
        """
        shared = Shared(self._rotary(batch.positions_BQ), batch)
        x_TD = torch.embedding(self._embedding, tokens_BQ.flatten())
        for layer, cache_NW in zip(self._layers, cache, strict=True):
            x_TD.add_(layer.attention(layer.attention_norm(x_TD), cache_NW, shared))
            x_TD.add_(layer.ffn(layer.ffn_norm(x_TD)))
        hidden_TD = self._norm(x_TD)
        if not math.isfinite(hidden_TD.sum().item()):
            return self._model.extend(tokens_BQ, cache, batch)
        return hidden_TD.view(*tokens_BQ.shape, -1)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """As `Transformer.logits`."""
        return self._model.logits(hidden_TD) if self._head_DV is None else torch.mm(hidden_TD, self._head_DV)


@torch.no_grad()
def few_rows_form(model: Transformer) -> FewRows | None:
    """The form of a model as it is now; None where it has none, because it is elsewhere, of another dtype, or has hooks
    (an adapter's), which a form would pass by."""
    weights = list(model.parameters())
    fits = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return FewRows(model) if fits and not hooked else None
