"""Low-rank corrections of one matrix, several beside each other: rows of a batch are multiplied with W + B A, each with
the pair A, B of its own adapter or with none.

The factors of all adapters stand side by side, X columns of whatever ranks: h = (x Aᵀ) ∘ mask, where the mask keeps the
columns of the row's own adapter, and x Wᵀ + h Bᵀ. Two thin products for all rows together cost less than gathering
each row's factors for as long as X stays well below the matrix's own width, and nothing has to be padded to one rank.

A module that multiplies a matrix by itself, and not by the `forward` of a linear layer or an embedding, takes part by
`own_products` and `corrections` (see `Correctable`); the others need know nothing. Left out: training (there an adapter
is a parametrization of the weight, `finetune.lora`).

Shapes: ... leading dimensions, B sequences, T tokens, R rows in expert order, X columns of all adapters, K inputs,
N outputs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from deepwright_kernels import ExpertOrder, grouped_linear


class Selection:
    """Which adapter each sequence of the next call uses: one object for all corrections of a model."""

    adapter_B: Tensor
    """int64 numbers of adapters, 0 for none. Set before each call; CUDA graphs want it at one address."""

    def of_tokens(self, tokens: int) -> Tensor:
        """[T], where the tokens of each sequence stand together."""
        each = tokens // len(self.adapter_B)
        return self.adapter_B[:, None].expand(-1, each).reshape(-1)


@dataclass(frozen=True)
class Correction:
    """a [X, K] and b [N, X] of all adapters (of a stack: [E, X, K] and [E, N, X]), scales multiplied in; owner_X: the
    number of the adapter that each column belongs to."""

    a_XK: Tensor
    b_NX: Tensor
    owner_X: Tensor
    selection: Selection

    def mask(self, x: Tensor) -> Tensor:
        """Which columns count for each sequence of x [B, ..., *]: bool [B, 1, ..., X]."""
        adapter_B = self.selection.adapter_B
        return adapter_B.view(-1, *(1,) * (x.dim() - 1)) == self.owner_X

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., N] = x [..., K] Wᵀ, corrected. The tokens of each sequence stand together."""
        x_BTK = x.reshape(len(self.selection.adapter_B), -1, x.shape[-1])
        h_BTX = (x_BTK @ self.a_XK.T) * self.mask(x_BTK)
        return y + (h_BTX @ self.b_NX.T).view(y.shape)

    def embedded(self, y: Tensor, tokens: Tensor) -> Tensor:
        """y [..., K], the rows `tokens` [...] of W [N, K], corrected."""
        tokens_BT = tokens.reshape(len(self.selection.adapter_B), -1)
        h_BTX = F.embedding(tokens_BT, self.b_NX) * self.mask(tokens_BT[..., None])
        return y + (h_BTX @ self.a_XK).view(y.shape)

    def grouped(self, y_RN: Tensor, x_RK: Tensor, order: ExpertOrder) -> Tensor:
        """y_RN, the product of each row with its expert's matrix of a stack, corrected."""
        tokens, copies = order.place_TK.shape
        adapter_R = self.selection.of_tokens(tokens)[order.order_R.clamp(min=0) // copies]
        h_RX = grouped_linear(x_RK, self.a_XK, order.ends_E) * (adapter_R[:, None] == self.owner_X)
        return y_RN + grouped_linear(h_RX, self.b_NX, order.ends_E)


@runtime_checkable
class Correctable(Protocol):
    """A module that multiplies some matrices itself.

    own_products: their names, as dotted paths below the module. corrections: those that are there at present, by name;
    the module adds them to its products. A name may belong to a linear layer whose `forward` is used as well.
    """

    own_products: ClassVar[tuple[str, ...]]
    corrections: dict[str, Correction]


def correct(model: nn.Module, path: str, correction: Correction) -> list[Any]:
    """Have a matrix corrected from now on. Returns handles whose `remove()` ends it; empty: nothing here can."""
    handles: list[Any] = []
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    if isinstance(owner, nn.Linear) and name == "weight":
        handles.append(owner.register_forward_hook(lambda _, args, y: correction.added(y, args[0])))
    elif isinstance(owner, nn.Embedding) and name == "weight":
        handles.append(owner.register_forward_hook(lambda _, args, y: correction.embedded(y, args[0])))
    names = path.split(".")
    for depth in range(len(names)):
        module = model.get_submodule(".".join(names[:depth]))
        below = ".".join(names[depth:])
        if isinstance(module, Correctable) and below in module.own_products:
            module.corrections[below] = correction
            handles.append(_Entry(module.corrections, below))
    return handles


@dataclass(frozen=True)
class _Entry:
    corrections: dict[str, Correction]
    name: str

    def remove(self) -> None:
        del self.corrections[self.name]
