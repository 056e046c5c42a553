"""Latent attention for a few new tokens on a CPU, in as few calls of torch as it takes.

The same function as `LatentAttention`'s absorbed form, with the absorption done in the weights instead of the
activations. One product gives all that is read of a token: for each head W_kᵀ W_q x beside its rope query, and behind
the heads the latent and rope key that are cached, so that queries and cache rows have one layout [latent | rope] and
one call turns them all. One product maps what the heads mix of latents to the output, through W_o W_v.

Leaves out queries of low rank (their norm stands between the two matrices), odd latents (behind which pairs are no
complex numbers in place), caches in FP8 and adapters.

Shapes: B sequences, Q new tokens of each, T = B * Q, D hidden, H heads, Y = P + R a query's width without and with
position, V value width, C latent width, W = C + R, N cache slots, K keys, F = R / 2 rope pairs, X = Q * H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepwright_core.model.few_rows import FewRowsNorm, Shared, as_it_is, transposed

if TYPE_CHECKING:
    from .latent_attention import LatentAttention


class FewQueries:
    """The form of one layer."""

    def __init__(self, attention: LatentAttention) -> None:
        heads, latent = attention.heads, attention.latent_dim
        query_HYD = attention.q.weight.unflatten(0, (heads, -1))
        nope_HPD, rope_HRD = query_HYD.split([attention.nope_dim, attention.rope_dim], 1)
        expand_HXC = attention.kv_b.weight.unflatten(0, (heads, -1))
        key_HPC, value_HVC = expand_HXC.split([attention.nope_dim, attention.value_dim], 1)
        query_HWD = torch.cat([key_HPC.transpose(1, 2) @ nope_HPD, rope_HRD], 1)
        self._in_DX = transposed(query_HWD.flatten(0, 1), attention.kv_a.weight)
        out_HDV = attention.o.weight.unflatten(1, (heads, -1)).transpose(0, 1)
        self._out_XD = (out_HDV @ value_HVC).transpose(1, 2).flatten(0, 1).contiguous()
        self._norm = FewRowsNorm(attention.kv_norm)
        self._heads, self._latent, self._scale = heads, latent, attention.scale
        self._otherwise = as_it_is(attention)

    def __call__(self, x_TD: Tensor, cache_NW: Tensor, shared: Shared) -> Tensor:
        """Caches the new tokens and attends to all that is cached."""
        batch = shared.batch
        if cache_NW.dtype != torch.float32:
            return self._otherwise(x_TD, cache_NW, shared)
        sequences, queries = batch.positions_BQ.shape
        heads, latent, width = self._heads, self._latent, cache_NW.shape[1]
        read_TYW = torch.mm(x_TD, self._in_DX).view(-1, heads + 1, width)
        rope_TYF2 = read_TYW[:, :, latent:].unflatten(2, (-1, 2))
        torch.view_as_complex(rope_TYF2).mul_(shared.turns_T1F)
        new_TW = read_TYW[:, heads]
        self._norm.in_place(new_TW[:, :latent])
        cache_NW.index_copy_(0, shared.slots_T, new_TW)

        blocks_XY = cache_NW.view(-1, batch.block_size * width)
        rows_BKW = torch.embedding(blocks_XY, batch.blocks_BP).view(sequences, -1, width)
        query_BXW = read_TYW[:, :heads].reshape(sequences, queries * heads, width)
        unseen = shared.unseen_BQK
        if queries > 1:
            unseen = unseen.repeat_interleave(heads, 1)
        score_BXK = torch.baddbmm(unseen, query_BXW, rows_BKW.transpose(1, 2), alpha=self._scale)
        mixed_BXC = torch.bmm(score_BXK.softmax(2), rows_BKW[:, :, :latent])
        return torch.mm(mixed_BXC.view(-1, heads * latent), self._out_XD)
