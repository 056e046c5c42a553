"""A small mixture for a few tokens on a CPU: every expert computes every token, and those not chosen count for nothing.

Two products in place of an order, a permutation, grouped products and the way back. A batch's tokens choose nearly all
experts anyhow, whose weights are then read once in either form; more multiplications cost less than more calls, as long
as weights and tokens are few. The shared experts are further columns, of weight one, and so are the router's logits.

Left out: corrections by adapters, experts on other ranks. Where an expert's hidden values overflow float32, so do the
tokens that did not choose it (zero times infinity is no number); `FewRows` then lets the mixture itself do it.

Shapes: T tokens, D hidden, E experts, K experts per token, I expert width, S width of the shared experts together,
X = E * I + S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deepwright_core.model.few_rows import transposed
from deepwright_kernels.route.reference import first_by_sorting, keep_top_groups

from .routing import Rule

if TYPE_CHECKING:
    from .mixture import MixtureOfExperts


MOST_PRODUCTS = 1 << 25
"""Multiplications of one call, beyond which those made in vain cost more than the calls saved: measured on one core
with 8 experts of which 2 are chosen, where both forms are even at twice as many."""


class Chooser(Protocol):
    """logits_TE -> what each expert's result counts for each token [T, E]; 0: not chosen."""

    def __call__(self, logits_TE: Tensor) -> Tensor: ...


class ChooseBest:
    """The operator `route` in few calls."""

    def __init__(self, bias_E: Tensor | None, top_k: int, rule: Rule) -> None:
        self._bias_E, self._top_k, self._rule = bias_E, top_k, rule
        self._tiny_1 = torch.full((1,), 1e-20)

    def __call__(self, logits_TE: Tensor) -> Tensor:
        rule = self._rule
        scores_TE = logits_TE.sigmoid() if rule["scoring"] == "sigmoid" else logits_TE.softmax(-1)
        choice_TE = scores_TE if self._bias_E is None else scores_TE + self._bias_E
        if rule["groups"] > rule["top_groups"]:
            groups = rule["groups"], rule["top_groups"], rule["group_best"]
            choice_TE = keep_top_groups(choice_TE, *groups, first_by_sorting)
        experts_TK = choice_TE.sort(dim=-1, descending=True, stable=True)[1][:, : self._top_k]
        weights_TK = scores_TE.gather(1, experts_TK)
        if rule["normalise"]:
            weights_TK.div_(weights_TK.sum(1, True).add_(self._tiny_1))
        if rule["scaling"] != 1.0:
            weights_TK.mul_(rule["scaling"])
        return torch.zeros_like(scores_TE).scatter_(1, experts_TK, weights_TK)


class FewTokens:
    """The form of one mixture."""

    def __init__(self, mixture: MixtureOfExperts, router_ED: Tensor, choose: Chooser) -> None:
        experts, shared = mixture.experts, mixture.shared
        gate_EID, up_EID = experts.gate_up_EID.chunk(2, 1)
        gates, ups = [gate_EID.flatten(0, 1)], [up_EID.flatten(0, 1)]
        downs = [experts.down_EDI.transpose(1, 2).flatten(0, 1)]
        self._experts, self._width = len(router_ED), gate_EID.shape[1]
        if shared is not None:
            gates.append(shared.gate.weight)
            ups.append(shared.up.weight)
            downs.append(shared.down.weight.T)
        self._in_DX = transposed(*gates, *ups, router_ED)
        self._out_XD = torch.cat(downs)
        hidden = len(self._out_XD)
        self._parts = [hidden, hidden, self._experts]
        self._choose = choose
        self._mixture = mixture

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The chosen experts' weighted sum, and the shared ones'."""
        if len(x_TD) * (self._in_DX.numel() + self._out_XD.numel()) > MOST_PRODUCTS:
            return self._mixture(x_TD[:, None], None)[:, 0]
        gate_TX, up_TX, logits_TE = torch.mm(x_TD, self._in_DX).split_with_sizes(self._parts, 1)
        weight_TE = self._choose(logits_TE)
        hidden_TX = F.silu(gate_TX).mul_(up_TX)
        routed_TEI = hidden_TX[:, : self._experts * self._width].unflatten(1, (self._experts, self._width))
        routed_TEI.mul_(weight_TE.unsqueeze(2))
        return torch.mm(hidden_TX, self._out_XD)
