"""Tensors: turns a plan of sequences into calls of the model, and its logits into tokens.

The runner keeps, on the model's device, one row for each decoding sequence (last token, length, block table, sampling
parameters), so that a decode step builds nothing: it slices the rows, and afterwards writes the drawn tokens into them.
The host hears of a step once, when tokens and log-probabilities come over together. On a GPU the model's part of a
decode step is a CUDA graph (`graphs`), for which rows and block tables are padded to a few sizes; on a CPU a small
model decodes in a form with few calls (`deepwright_core.model.few_rows`).
Left out: several devices.

Shapes: R rows (`max_batch` of them), B sequences of one call, Q new tokens of each, P blocks, N slots, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError
from ..model.cache import CacheBatch
from ..model.few_rows import FewRows, form_of
from .adapters import Adapters
from .controls import Controls
from .draw import Draw, Reader
from .graphs import WARM_CONTEXT, Graphs, padded, row_sizes, width_sizes
from .parcel import Parcel, on_device
from .sampler import SamplingRows, sample
from .scheduler import Chunk, Plan
from .scores import AnswerScores, PromptScores
from .sequence import Drawn, Sequence
from .speculation import DecodingRows, DraftingModel, Speculation, modules_used

CacheDtype = Literal["auto", "fp8"]
GraphsOption = Literal["auto", "off"]

FREE_PADDING = 256
PADDING_SHARE = 0.25
"""A prefill call may hold FREE_PADDING padded tokens (about what the overhead of one more call costs on a CPU) plus
this share of its real ones; what would pad more goes into a call of its own."""


class GenerationModel(Protocol):
    """What the engine asks of a model (an `nn.Module` with a config that knows its `vocab_size`)."""

    config: Any
    training: bool

    @property
    def cache_widths(self) -> list[int]:
        """Values cached per token, layer by layer."""

    @property
    def fp8_cache_bytes(self) -> list[int | None]:
        """Bytes cached per token in FP8, layer by layer; None for a layer that has no such cache."""

    @property
    def max_positions(self) -> int:
        """Longest sequence, in tokens."""

    def extend(self, tokens_BQ: Tensor, cache: list[Tensor], batch: CacheBatch) -> Tensor:
        """Write the new tokens into the cache and return their hidden states [B, Q, D]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of hidden states."""

    def parameters(self) -> Any:
        """The weights; the first tells device and (unless FP8 is asked for) dtype of the cache."""

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation."""


def new_cache(
    model: GenerationModel, slots: int, cache_dtype: CacheDtype, weight: Tensor, modules: int
) -> list[Tensor]:
    """The cache of every layer and of `modules` MTP modules, [slots, width] in the weights' dtype or [slots, bytes] in
    FP8."""
    drafting = model if modules and isinstance(model, DraftingModel) else None
    if cache_dtype == "auto":
        widths = model.cache_widths + (drafting.further_cache_widths[:modules] if drafting else [])
        return [torch.zeros(slots, width, dtype=weight.dtype, device=weight.device) for width in widths]
    sizes = model.fp8_cache_bytes + (drafting.further_fp8_cache_bytes[:modules] if drafting else [])
    without = [layer for layer, size in enumerate(sizes) if size is None]
    if without:
        raise RequestError(
            f"cache_dtype is 'fp8', and the attention of layers {without} has no FP8 cache (latent attention has one "
            "when kv_lora_rank is a multiple of 128); expected 'auto'."
        )
    return [torch.zeros(slots, size, dtype=torch.uint8, device=weight.device) for size in sizes if size is not None]


def signed_seed(seed: int) -> int:
    """Any integer as the int64 with its low 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def grouped(chunks: Ordered[Chunk]) -> list[list[Chunk]]:
    """Chunks that share a call: of one level, and of lengths near enough that padding stays small."""
    groups: list[list[Chunk]] = []
    level = longest = real = padded = 0
    for chunk in sorted(chunks, key=lambda c: (c.level, c.start - c.end)):
        length = chunk.end - chunk.start
        waste = padded + longest - length
        if groups and chunk.level == level and waste <= FREE_PADDING + PADDING_SHARE * (real + length):
            groups[-1].append(chunk)
            real, padded = real + length, waste
        else:
            groups.append([chunk])
            level, longest, real, padded = chunk.level, length, length, 0
    return groups


class RunningStep:
    """A step that the device works on."""

    def __init__(self, plan: Plan, parcel: Parcel, prompts: PromptScores, read: Reader | None) -> None:
        self.plan = plan
        self._parcel, self._prompts, self._read = parcel, prompts, read

    def finish(self) -> list[list[Drawn]]:
        """Wait for it; the tokens drawn for each of `plan.rows`."""
        if self._read is None and not self._prompts:
            return []
        arrays = self._parcel.open()
        self._prompts.arrive(arrays)
        return [] if self._read is None else self._read(arrays)


class ModelRunner:
    """The model, its cache, and the rows of the decoding sequences."""

    def __init__(
        self,
        model: GenerationModel,
        adapters: Adapters,
        *,
        blocks: int,
        block_size: int,
        max_batch: int,
        row_blocks: int,
        cache_dtype: CacheDtype,
        graphs: GraphsOption,
        drafts: int,
    ) -> None:
        weight = next(iter(model.parameters()))
        self.model = model
        self.device = weight.device
        self.block_size = block_size
        slots = (blocks + 1) * block_size  # block 0 is the padding's
        modules = modules_used(model, drafts)
        self.cache = new_cache(model, slots, cache_dtype, weight, modules)
        self._layer_cache = self.cache[: len(self.cache) - modules]

        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(max_batch, *shape, dtype=dtype, device=self.device)

        self._adapters = adapters
        self._adapter_R = column(torch.int64)
        self._token_R = column(torch.int64)
        self._length_R = column(torch.int64).fill_(1)
        self._blocks_RP = column(torch.int64, row_blocks)
        self._sampling_R = SamplingRows(
            temperature_B=column(torch.float32),
            top_p_B=column(torch.float32),
            min_p_B=column(torch.float32),
            top_k_B=column(torch.int64),
            seed_B=column(torch.int64),
        )
        self._repeated: SamplingRows | None = None  # `_sampling_R`, once for each token that a row draws in a step
        self._filled = 0  # rows from here on are padding: token 0, length 1, all blocks 0
        self._any_random = self._any_truncated = self._any_controlled = self._any_scored = False
        self._controls = Controls(model.config.vocab_size, self.device)
        self._graphs = Graphs(self.device) if graphs == "auto" and self.device.type == "cuda" else None
        self._row_sizes, self._width_sizes = row_sizes(max_batch), width_sizes(block_size, row_blocks)
        self._addresses = self._weight_addresses()
        self._few_rows: FewRows | None = form_of(self.model)
        self._speculation: Speculation | None = None
        if modules and isinstance(model, DraftingModel):
            self._speculation = Speculation(
                model,
                drafts,
                self.cache[-modules:],
                rows=max_batch,
                hidden_size=model.config.hidden_size,
                dtype=weight.dtype,
                block_size=block_size,
            )

    def start(self, plan: Plan) -> RunningStep:
        """Ask the device for a step. It goes on while the host does other things, the next step's start included."""
        self._align(plan)
        parcel = Parcel()
        prompts = PromptScores(self._prompt_logits, self.model.config.vocab_size, parcel)
        read = (self._run_plainly if self._speculation is None else self._run_speculatively)(plan, parcel, prompts)
        if read is not None or prompts:
            parcel.send()
        return RunningStep(plan, parcel, prompts, read)

    @property
    def runs_ahead(self) -> bool:
        """Whether something is gained by starting a step before the host has read what the one before drew (the device
        has that in its rows)."""
        return self.device.type == "cuda"

    def warm_up(self) -> None:
        """Capture all sizes of the decode step while every row is padding, and compile what draws."""
        if self._graphs is None:
            return
        self._clear(0)
        logits_1V = torch.zeros(1, self.model.config.vocab_size, device=self.device)
        first, length_1 = self._sampling_R.first(1), self._length_R[:1]
        for any_random, any_truncated in ((False, False), (True, False), (True, True)):
            sample(logits_1V, first, length_1, any_random=any_random, any_truncated=any_truncated)
        longest = min(math.ceil(WARM_CONTEXT / self.block_size), self._width_sizes[-1])
        widths = [width for width in self._width_sizes if width <= padded(longest, self._width_sizes)]
        if self._speculation is not None:
            for rows in self._row_sizes:
                self._captured("accept", rows, 1, self._accept_in_rows)
        for width in reversed(widths):  # what needs most memory comes first, the others find it there
            for rows in reversed(self._row_sizes):
                if self._speculation is None:
                    self._captured("decode", rows, width, self._extend_rows)
                    continue
                self._captured("verify", rows, width, self._verify_rows)
                for self._any_random in (True, False):
                    self._captured(self._drafting, rows, width, self._draft_rows)

    def weights_changed(self) -> None:
        """The model's parameters were written to; where they lie elsewhere than before, graphs are captured anew."""
        addresses = self._weight_addresses()
        if addresses != self._addresses and self._graphs is not None:
            self._graphs.forget()
        self._addresses = addresses
        self._few_rows = form_of(self.model)

    def layers_changed(self) -> None:
        """The model does other work than before: graphs are captured anew."""
        if self._graphs is not None:
            self._graphs.forget()
        self._few_rows = form_of(self.model)

    def _model_for(self, rows: int) -> GenerationModel | FewRows:
        """What decodes so many rows."""
        few_rows = self._few_rows
        return self.model if few_rows is None or not few_rows.takes(rows) else few_rows

    def _weight_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.model.parameters()]

    def _run_plainly(self, plan: Plan, parcel: Parcel, prompts: PromptScores) -> Reader | None:
        """The step with one token a row."""
        hidden = [self._decode(plan.decode)] if plan.decode else []
        hidden += [states_JXD[:, 0] for states_JXD in self._prefill(plan, prompts)]
        if not hidden:
            return None
        self._join(plan)
        length_B = self._length_R[: len(plan.rows)]
        logits_BV = self._logits(torch.cat(hidden) if len(hidden) > 1 else hidden[0], len(plan.rows))
        draw = self._draw(plan.rows, logits_BV, length_B[:, None], parcel)
        self._token_R[: len(plan.rows)] = draw.token_BQ[:, 0]
        length_B += 1
        return draw.read

    def _run_speculatively(self, plan: Plan, parcel: Parcel, prompts: PromptScores) -> Reader | None:
        """The step with drafts: verify those there are, accept, and draft anew."""
        speculation = self._speculation
        assert speculation is not None
        first, count = len(plan.decode), len(plan.rows)
        if plan.decode:
            self._captured("verify", first, max(len(sequence.blocks) for sequence in plan.decode), self._verify_rows)
        for states_JXD in self._prefill(plan, prompts):
            room_J = self._tensor([sequence.room(self.block_size) for sequence in plan.joined])
            speculation.join(slice(first, count), states_JXD, room_J)
        if not count:
            return None
        self._join(plan)
        length_B = self._length_R[:count]
        logits_XV = self._logits(speculation.hidden_RQD[:count].flatten(0, 1), count)
        draw = self._draw(plan.rows, logits_XV, speculation.positions(length_B), parcel)
        speculation.drawn_RQ[:count] = draw.token_BQ
        accepted_B = self._captured("accept", count, 1, self._accept_in_rows)[:count]
        draw.accept(accepted_B)
        parcel.send()  # the host need not wait for the drafts
        self._captured(self._drafting, count, max(len(sequence.blocks) for sequence in plan.rows), self._draft_rows)
        self._token_R[:count] = draw.token_BQ.gather(1, accepted_B[:, None])[:, 0]
        length_B += accepted_B + 1
        return draw.read

    @property
    def _drafting(self) -> str:
        """The name of drafting, of which a graph depends on how it draws."""
        return "draft at random" if self._any_random else "draft"

    def _verify_rows(self, count: int, width: int) -> Tensor:
        """One call of the model over the first `count` rows and their drafts: hidden states [B, Q, D]."""
        assert self._speculation is not None
        tokens_BQ, batch = self._speculation.queries(self._decoding(count, width))
        return self._speculation.hidden_RQD[:count].copy_(self._extend_decoding(tokens_BQ, batch))

    def _accept_in_rows(self, count: int, width: int) -> Tensor:
        """How many drafts of each of the first `count` rows are accepted [B], of whatever width their tables are."""
        assert self._speculation is not None
        return self._speculation.accept(self._length_R[:count])

    def _draft_rows(self, count: int, width: int) -> Tensor:
        """The next drafts of the first `count` rows [R, K]."""
        assert self._speculation is not None
        rows = self._sampling_R.first(count)
        decoding = self._decoding(count, width)
        # One graph serves all that is drawn at random: where nothing is to be left out, leaving out costs little.
        truncated = self._any_truncated or self._graphs is not None

        def draw(logits_BV: Tensor, position_B: Tensor) -> Tensor:
            return sample(logits_BV, rows, position_B, any_random=self._any_random, any_truncated=truncated)[0]

        self._speculation.advance(decoding, draw)
        return self._speculation.draft_RK

    def _decoding(self, count: int, width: int) -> DecodingRows:
        """The first `count` rows and `width` of their blocks: those of the model's next calls."""
        self._adapters.select(self._adapter_R[:count])
        return DecodingRows(self._token_R[:count], self._length_R[:count], self._blocks_RP[:count, :width])

    def _captured(self, name: str, count: int, width: int, work: Callable[[int, int], Tensor]) -> Tensor:
        """What `work` gives for (at least) `count` rows and `width` blocks; through a graph where there are graphs."""
        if self._graphs is None:
            return work(count, width)
        count, width = padded(count, self._row_sizes), padded(width, self._width_sizes)
        return self._graphs.run((name, count, width), lambda: work(count, width))

    def _logits(self, hidden: Tensor, count: int) -> Tensor:
        """Logits of states of the first `count` rows."""
        self._adapters.select(self._adapter_R[:count])
        return self._model_for(len(hidden)).logits(hidden)

    def _prompt_logits(self, hidden_ND: Tensor, sequence: Sequence) -> Tensor:
        """Logits of states of one sequence."""
        if self._adapters:
            self._adapters.select(self._tensor([sequence.adapter]))
        return self.model.logits(hidden_ND)

    # Decode ------------------------------------------------------------------------------------------

    def _decode(self, sequences: list[Sequence]) -> Tensor:
        """Hidden states [B, D] of the last token of each row."""
        count, width = len(sequences), max(len(sequence.blocks) for sequence in sequences)
        return self._captured("decode", count, width, self._extend_rows)[:count]

    def _extend_rows(self, count: int, width: int) -> Tensor:
        """One call of the model over the first `count` rows and `width` of their blocks: hidden states [B, D]."""
        token_B, length_B, blocks_BP = self._decoding(count, width)
        position_B1 = (length_B - 1)[:, None]
        place_B1 = position_B1 // self.block_size
        # block * size + position % size
        slot_B1 = position_B1.add(blocks_BP.gather(1, place_B1) - place_B1, alpha=self.block_size)
        batch = CacheBatch(position_B1, slot_B1, blocks_BP, length_B, self.block_size)
        return self._extend_decoding(token_B[:, None], batch)[:, 0]

    def _extend_decoding(self, tokens_BQ: Tensor, batch: CacheBatch) -> Tensor:
        """Hidden states [B, Q, D] of decoding rows."""
        return self._model_for(tokens_BQ.numel()).extend(tokens_BQ, self._layer_cache, batch)

    def _draw(self, sequences: list[Sequence], logits_XV: Tensor, position_BQ: Tensor, parcel: Parcel) -> Draw:
        """Draw a token for each position of each row; logits [B · Q, V]."""
        count, queries = position_BQ.shape
        controls = self._controls.of(sequences) if self._any_controlled else None
        if self._repeated is None or len(self._repeated.seed_B) != count * queries:
            self._repeated = self._sampling_R.first(count).repeated(queries)
        token_X, logprob_X = sample(
            logits_XV if controls is None else controls.adjust(logits_XV, queries),
            self._repeated,
            position_BQ.flatten(),
            any_random=self._any_random,
            any_truncated=self._any_truncated,
        )
        token_BQ, logprob_BQ = token_X.view(count, queries), logprob_X.view(count, queries)
        forced_B = None
        if controls is not None:
            token_BQ[:, 0], logprob_BQ[:, 0], forced_B = controls.settle(token_BQ[:, 0], logprob_BQ[:, 0])
        scores = AnswerScores(sequences, logits_XV, token_BQ, parcel) if self._any_scored else None
        return Draw(token_BQ, logprob_BQ, forced_B, scores, parcel)

    # Prefill -----------------------------------------------------------------------------------------

    def _prefill(self, plan: Plan, prompts: PromptScores) -> list[Tensor]:
        """Compute all chunks. States [J, X, D] of each of `plan.joined`, if there are any: the hidden of its last token
        and, behind it, what speculation carries on."""
        complete = {sequence.request_id: index for index, sequence in enumerate(plan.joined)}
        order: list[int] = []
        last = []
        for group in grouped(plan.chunks):
            hidden = self._extend(group)
            for row, chunk in enumerate(group):
                prompts.take(chunk.sequence, chunk.start, hidden[0][row, : chunk.end - chunk.start])
            rows = [i for i, chunk in enumerate(group) if chunk.end == len(chunk.sequence)]
            if rows:
                order += [complete[group[i].sequence.request_id] for i in rows]
                ends_J = self._tensor([group[i].end - group[i].start - 1 for i in rows])
                rows_J = self._tensor(rows)
                # An entry of module d needs d + 1 tokens more than the main model's (and a short prompt may have none).
                states = [h_BQD[rows_J, (ends_J - depth).clamp(min=0)] for depth, h_BQD in enumerate(hidden)]
                last.append(torch.stack(states, 1))
        return [torch.cat(last)[self._tensor(np.argsort(order))]] if last else []

    def _extend(self, group: list[Chunk]) -> list[Tensor]:
        """One call of the model over chunks, padded on the right: hidden [B, Q, D], and that of each MTP module but the
        last, which carries nothing on."""
        modules = len(self._speculation.cache) if self._speculation is not None else 0
        start_B = np.array([chunk.start for chunk in group])
        count_B = np.array([chunk.end - chunk.start for chunk in group])
        queries = int(count_B.max())
        tokens_BX = np.zeros((len(group), queries + modules), dtype=np.int64)
        blocks_BP = np.zeros((len(group), -(-int((start_B + count_B).max()) // self.block_size)), dtype=np.int64)
        for row, chunk in enumerate(group):
            ids = chunk.sequence.tokens[chunk.start : chunk.end + modules]
            tokens_BX[row, : len(ids)] = ids
            used = chunk.sequence.blocks[: -(-chunk.end // self.block_size)]
            blocks_BP[row, : len(used)] = used
        tokens, blocks = self._tensor(tokens_BX), self._tensor(blocks_BP)
        batch = self._chunk_batch(start_B, count_B, blocks_BP, queries, blocks)
        if self._adapters:
            self._adapters.select(self._tensor([chunk.sequence.adapter for chunk in group]))
        hidden_BQD = self.model.extend(tokens[:, :queries], self._layer_cache, batch)
        if self._speculation is None:
            return [hidden_BQD]
        length_B = np.array([len(chunk.sequence) for chunk in group])
        batches = []
        for depth in range(modules):
            known_B = np.clip(length_B - 1 - depth - start_B, 0, count_B)
            batches.append(self._chunk_batch(start_B, known_B, blocks_BP, queries, blocks))
        return [hidden_BQD, *self._speculation.fill(hidden_BQD, tokens, batches)[:-1]]

    def _chunk_batch(
        self, start_B: np.ndarray, count_B: np.ndarray, blocks_BP: np.ndarray, queries: int, blocks: Tensor
    ) -> CacheBatch:
        """Where the `count_B` tokens from `start_B` on go, padded to `queries`."""
        size = self.block_size
        offset_Q = np.arange(queries)
        real_BQ = offset_Q < count_B[:, None]
        positions_BQ = np.where(real_BQ, start_B[:, None] + offset_Q, 0)
        owned_BQ = np.take_along_axis(blocks_BP, positions_BQ // size, axis=1) * size + positions_BQ % size
        slots_BQ = np.where(real_BQ, owned_BQ, offset_Q % size)
        lengths_B = np.maximum(start_B + count_B, 1)  # a short prompt may have no entry of an MTP module yet
        return CacheBatch(self._tensor(positions_BQ), self._tensor(slots_BQ), blocks, self._tensor(lengths_B), size)

    # Rows --------------------------------------------------------------------------------------------

    def _align(self, plan: Plan) -> None:
        """Bring the rows into the plan's order: sequences that left make holes, the others move up; then new blocks."""
        moved = [(row, s.row) for row, s in enumerate(plan.decode) if s.row != row]
        if moved:
            to, of = self._tensor(np.array(moved).T)
            for column in self._columns():
                column[to] = column[of]
            for row, _ in moved:
                plan.decode[row].row = row
            self._repeated = None
        self._clear(len(plan.decode))
        if plan.grown:
            new = [(s.row, place, s.blocks[place]) for s, first in plan.grown for place in range(first, len(s.blocks))]
            rows, places, blocks = self._tensor(np.array(new).T)
            self._blocks_RP[rows, places] = blocks
        if self._speculation is not None:
            changed = [sequence for sequence, _ in plan.grown] + [s for s in plan.decode if s.rules is not None]
            if changed:
                rows, rooms = self._tensor(np.array([(s.row, s.room(self.block_size)) for s in changed]).T)
                self._speculation.room_R[rows] = rooms

    def _clear(self, count: int) -> None:
        """Make padding of the rows from `count` on: a row that was left must not be written for, its blocks may be
        another's."""
        if count < self._filled:
            left = slice(count, self._filled)
            self._token_R[left] = 0
            self._length_R[left] = 1
            self._blocks_RP[left] = 0
            if self._speculation is not None:
                self._speculation.room_R[left] = 0
        self._filled = count

    def _join(self, plan: Plan) -> None:
        """Fill rows for the sequences whose prefill is complete, behind those that decode."""
        if not plan.joined:
            return
        # Sequences that leave may make these needlessly true until the next one joins; that changes no result.
        self._any_random = any(not s.params.greedy for s in plan.rows)
        self._any_truncated = any(s.params.truncated for s in plan.rows)
        self._any_controlled = any(s.controlled for s in plan.rows)
        self._any_scored = any(s.params.scores is not None for s in plan.rows)
        first, joined = len(plan.decode), plan.joined
        self._filled = first + len(joined)
        span = slice(first, first + len(joined))
        blocks_BP = np.zeros((len(joined), self._blocks_RP.shape[1]), dtype=np.int64)
        for offset, sequence in enumerate(joined):
            sequence.row = first + offset
            blocks_BP[offset, : len(sequence.blocks)] = sequence.blocks
        if self._adapters:  # what stands in a row otherwise is no loaded adapter's number
            self._adapter_R[span] = self._tensor([sequence.adapter for sequence in joined])
        params = [sequence.params for sequence in joined]
        self._blocks_RP[span] = self._tensor(blocks_BP)
        self._length_R[span] = self._tensor([len(sequence) for sequence in joined])
        self._repeated = None
        sampling = self._sampling_R
        sampling.temperature_B[span] = self._tensor([p.temperature for p in params], np.float32)
        sampling.top_p_B[span] = self._tensor([p.top_p for p in params], np.float32)
        sampling.min_p_B[span] = self._tensor([p.min_p for p in params], np.float32)
        sampling.top_k_B[span] = self._tensor([min(p.top_k, 1 << 31) for p in params])
        sampling.seed_B[span] = self._tensor([signed_seed(p.seed) for p in params])

    def _columns(self) -> list[Tensor]:
        return [
            self._adapter_R,
            self._token_R,
            self._length_R,
            self._blocks_RP,
            *self._sampling_R.columns(),
            *(self._speculation.columns() if self._speculation is not None else ()),
        ]

    def _tensor(self, values: Any, dtype: type = np.int64) -> Tensor:
        return on_device(values, self.device, dtype)
