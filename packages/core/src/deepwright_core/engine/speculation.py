"""Speculative decoding with the model's own MTP modules (DeepSeek-V3 report, sections 2.2 and 5.4.3).

A step gives every row one query for its last token and one for each of K drafted tokens, draws the target's own token
at each place with the counter of that place, and accepts drafts for as long as they equal what was drawn. So what comes
out is, token by token, what comes out without drafts, for every seed, temperature and truncation: the distribution is
the target's because nothing else is ever drawn from.

Drafts come from the modules in turn, then from the last of them repeatedly. They are drawn as the target's tokens are:
with the request's temperature and truncation, and with the very counters that the target will use at that place. Where
two distributions agree, they then give the same token (Daliri, Musco & Suresh 2024, "Coupling without communication and
drafter-invariant speculative decoding"). On a briefly trained model at temperature 1, 61 % of first drafts are accepted
in this way and 68 % would be by rejection sampling (Leviathan et al. 2023, algorithm 1), whose tokens depend on the
drafts: a seed would give other tokens with speculation than without. Most probable tokens as drafts: 17 %.

An entry of module d at position i is made of the previous depth's hidden at i and the token at i + 1 + d. When the
tokens 0..n are known (the last not yet given to the main model), the main model's entries stand up to n - 1 and module
d's up to n - 1 - d: every step writes as many entries of each. Two things follow.

- A block's last entries hang on tokens behind the block. Its digest therefore covers `modules` tokens more than it
  holds, and it is known when these are (`Scheduler.lookahead`).
- Module d needs, for the first of the entries that a step adds, a hidden of module d - 1 from the step before: each row
  carries those.

What modules write for drafts lies behind these entries and is overwritten by them. All tensors are static: a step asks
the device nothing, and the next one may be started before anybody has read how many drafts this one accepted.

Left out: trees of drafts, and drafts where what is drawn behind them hangs on what they are: penalties, grammars, and
the draws that a least length or thinking control binds (`Sequence.room`). Those drafts are not accepted, while their
modules' entries are kept right for those who share their blocks.

Shapes: R rows, B of them, K drafts, Q = K + 1 queries, M modules, J sequences whose prefill is complete, P blocks,
N slots, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import RequestError
from ..model.cache import CacheBatch

MAX_DRAFTS = 3
"""Latent attention decodes with up to four queries a sequence; with more it takes the form of prefill."""

Draw = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, V] of all rows and the positions [B] of the tokens to draw from them -> tokens [B]."""


@runtime_checkable
class DraftingModel(Protocol):
    """What a model with MTP modules offers beyond a `GenerationModel`."""

    @property
    def further_cache_widths(self) -> list[int]:
        """Values cached per token, module by module; empty: there is no module."""

    @property
    def further_fp8_cache_bytes(self) -> list[int | None]:
        """Bytes cached per token in FP8, module by module; None for one that has no such cache."""

    def extend_further(
        self, hidden_BQD: Tensor, next_tokens_BQ: Tensor, depth: int, cache_NW: Tensor, batch: CacheBatch
    ) -> Tensor:
        """Write entries of module `depth` into its cache and return their hidden states [B, Q, D]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of hidden states."""


class DecodingRows(NamedTuple):
    """Views of the runner's rows: last token and length of each, and its blocks [B, P]."""

    token_B: Tensor
    length_B: Tensor
    blocks_BP: Tensor


def modules_used(model: object, drafts: int) -> int:
    """How many MTP modules take part in `drafts` drafts a step; refuses what the model cannot draft."""
    if not 0 <= drafts <= MAX_DRAFTS:
        raise RequestError(f"speculate is {drafts}; expected 0 (off) to {MAX_DRAFTS} drafted tokens a step.")
    depth = len(model.further_cache_widths) if isinstance(model, DraftingModel) else 0
    if drafts and not depth:
        raise RequestError(
            f"speculate is {drafts}, and the model has no MTP module to draft with (model.mtp.depth is 0); expected 0, "
            "or a model that was trained with such modules."
        )
    return min(drafts, depth)


def own_entries(index_BQ: Tensor, real_BQ: Tensor, blocks_BP: Tensor, lengths_B: Tensor, size: int) -> CacheBatch:
    """A batch for the entries `index_BQ` of rows; those that are not real go to the padding's block.

    lengths_B: entries that the rows then have; rows of very short sequences may be asked for less than none.
    """
    position_BQ = torch.where(real_BQ, index_BQ, 0)
    block_BQ = blocks_BP.gather(1, position_BQ // size)
    slots_BQ = torch.where(real_BQ, block_BQ * size + position_BQ % size, 0)
    return CacheBatch(position_BQ, slots_BQ, blocks_BP, lengths_B.clamp(min=1), size)


class Speculation:
    """The drafts of every row, what the modules need to make more, and the modules' part of the cache."""

    def __init__(
        self,
        model: DraftingModel,
        drafts: int,
        cache: list[Tensor],
        *,
        rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        block_size: int,
    ) -> None:
        self.model = model
        self.drafts = drafts
        self.cache = cache  # one tensor a module
        self.block_size = block_size
        device = cache[0].device
        self.draft_RK = torch.full((rows, drafts), -1, dtype=torch.int64, device=device)
        self.room_R = torch.zeros(rows, dtype=torch.int64, device=device)  # drafts stand at positions below it
        self.hidden_RQD = torch.zeros(rows, drafts + 1, hidden_size, dtype=dtype, device=device)
        # At m: the hidden of module m at the last position that it has an entry for, which module m + 1 needs next.
        self.carried_RMD = torch.zeros(rows, len(cache) - 1, hidden_size, dtype=dtype, device=device)
        # What was last drawn in each row from `hidden_RQD`, and how many drafts that accepts.
        self.drawn_RQ = torch.zeros(rows, drafts + 1, dtype=torch.int64, device=device)
        self.accepted_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._offset_Q = torch.arange(drafts + 1, device=device)

    def columns(self) -> list[Tensor]:
        """What moves when a row moves."""
        return [self.draft_RK, self.room_R, self.carried_RMD]

    # Prefill -----------------------------------------------------------------------------------------

    def fill(self, hidden_BQD: Tensor, tokens_BX: Tensor, batches: list[CacheBatch]) -> list[Tensor]:
        """Write the modules' entries for chunks of prompts; their hidden states [B, Q, D], module by module.

        tokens_BX: the tokens of the chunks and M more. batches: for each module, the entries that known tokens make.
        """
        hidden = []
        queries = hidden_BQD.shape[1]
        for depth, (cache_NW, batch) in enumerate(zip(self.cache, batches, strict=True)):
            tokens_BQ = tokens_BX[:, depth + 1 : depth + 1 + queries]
            hidden_BQD = self.model.extend_further(hidden_BQD, tokens_BQ, depth, cache_NW, batch)
            hidden.append(hidden_BQD)
        return hidden

    def join(self, rows: slice, states_JXD: Tensor, room_J: Tensor) -> None:
        """Fill rows whose prefill is complete. states_JXD: the main model's last hidden, and what the row carries."""
        self.hidden_RQD[rows] = states_JXD[:, :1]
        self.carried_RMD[rows] = states_JXD[:, 1:]
        self.draft_RK[rows] = -1  # which no token equals
        self.room_R[rows] = room_J

    # Verifying ---------------------------------------------------------------------------------------

    def queries(self, rows: DecodingRows) -> tuple[Tensor, CacheBatch]:
        """The last token of each row and its drafts [B, Q], and where they go."""
        usable_B = self._usable(rows.length_B)
        tokens_BQ = torch.cat((rows.token_B[:, None], self.draft_RK[: len(usable_B)].clamp(min=0)), 1)
        real_BQ = self._offset_Q <= usable_B[:, None]
        index_BQ = rows.length_B[:, None] - 1 + self._offset_Q
        return tokens_BQ, own_entries(index_BQ, real_BQ, rows.blocks_BP, rows.length_B + usable_B, self.block_size)

    def positions(self, length_B: Tensor) -> Tensor:
        """Positions of the tokens that are drawn from `hidden_RQD` [B, Q]."""
        return length_B[:, None] + self._offset_Q

    def accept(self, length_B: Tensor) -> Tensor:
        """How many drafts of each row are, one after the other, what was drawn at their places (`drawn_RQ`): [B]. That
        many tokens, and one more, are the row's new ones."""
        count = len(length_B)
        same_BK = self.drawn_RQ[:count, :-1] == self.draft_RK[:count]
        same_BK &= self._offset_Q[:-1] < self._usable(length_B)[:, None]
        self.accepted_R[:count] = same_BK.cumprod(1).sum(1)
        return self.accepted_R[:count]

    def _usable(self, length_B: Tensor) -> Tensor:
        """How many drafts of each row have a slot, and a token behind them that may be drawn."""
        return (self.room_R[: len(length_B)] - length_B).clamp(0, self.drafts)

    # Drafting ----------------------------------------------------------------------------------------

    def advance(self, rows: DecodingRows, draw: Draw) -> None:
        """Write the modules' entries that the noted tokens make possible, and draft for the next step. The rows are
        still as they were when these tokens were drawn."""
        count = len(rows.length_B)
        every = torch.arange(count, device=rows.length_B.device)
        drawn_BQ, accepted_B = self.drawn_RQ[:count], self.accepted_R[:count]
        last_B = rows.length_B + accepted_B  # position of the last new token, of which nothing is cached
        real_BQ = self._offset_Q <= accepted_B[:, None]
        carried_BMD = self.carried_RMD[:count]
        hidden_BQD, newest = self.hidden_RQD[:count], []
        for depth, cache_NW in enumerate(self.cache):
            if depth:
                hidden_BQD = torch.cat((carried_BMD[:, depth - 1, None], hidden_BQD[:, :-1]), 1)
            index_BQ = rows.length_B[:, None] - 1 - depth + self._offset_Q
            real_here_BQ = real_BQ & (index_BQ >= 0)
            batch = own_entries(index_BQ, real_here_BQ, rows.blocks_BP, last_B - depth, self.block_size)
            hidden_BQD = self.model.extend_further(hidden_BQD, drawn_BQ, depth, cache_NW, batch)
            newest.append(hidden_BQD[every, accepted_B])
        for depth, newest_BD in enumerate(newest[:-1]):
            carried_BMD[:, depth] = newest_BD
        self._draft(newest[0], last_B, rows.blocks_BP, draw)

    def _draft(self, hidden_BD: Tensor, last_B: Tensor, blocks_BP: Tensor, draw: Draw) -> None:
        """Draft the K tokens behind the known ones. hidden_BD: of module 0 at the last position it has an entry for."""
        rows = len(last_B)
        draft_BK, carried_BMD = self.draft_RK[:rows], self.carried_RMD[:rows]
        draft_BK[:, 0] = draw(self.model.logits(hidden_BD), last_B + 1)
        after_BQD = hidden_BD[:, None][:, :0]
        for count in range(1, self.drafts):  # drafts there are
            if count < len(self.cache):
                # The next module, at all positions where it lacks only drafts.
                depth = count
                inputs_BQD = torch.cat((carried_BMD[:, depth - 1, None], after_BQD), 1)
                tokens_BQ = draft_BK[:, :count]
                index_BQ = last_B[:, None] - depth + self._offset_Q[:count]
                real_BQ = index_BQ >= 0
            else:
                # The last module again, one position further: its own hidden stands for that of the depth before.
                depth = len(self.cache) - 1
                inputs_BQD = hidden_BD[:, None]
                tokens_BQ = draft_BK[:, count - 1, None]
                index_BQ = last_B[:, None] + count - len(self.cache)
                real_BQ = index_BQ < self.room_R[:rows, None]
            batch = own_entries(index_BQ, real_BQ, blocks_BP, index_BQ[:, -1] + 1, self.block_size)
            after_BQD = self.model.extend_further(inputs_BQD, tokens_BQ, depth, self.cache[depth], batch)
            hidden_BD = after_BQD[:, -1]
            draft_BK[:, count] = draw(self.model.logits(hidden_BD), last_B + 1 + count)
