"""Who runs next.

One step does two things: every decoding sequence gets a token, and up to `max_prefill_tokens` tokens of the waiting
ones are prefilled, in order of arrival; a longer prompt is split over steps. A sequence takes the blocks of its whole
prompt when it is admitted, and one more whenever it fills the last. When there is none, the sequence admitted last is
preempted: it loses its blocks, goes back to the head of the queue, and is prefilled again, generated tokens included.
With speculation, a step may give a sequence several tokens; drafts have the blocks that nobody needs more.
Left out: priorities and fairness between tenants (the server queues in front), swapping blocks to the host.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field

from .block_manager import BlockManager, block_digest, root_digest
from .sequence import Drawn, Sequence, TokenEvent


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..end of a sequence, to be prefilled.

    level: 0 when all that it attends to was computed in earlier steps; otherwise one more than the highest level of
    this step's chunks that write blocks it shares. So sixteen samples of one prompt prefill it once, in one step.
    """

    sequence: Sequence
    start: int
    end: int
    level: int


@dataclass(slots=True)
class Plan:
    """The work of one step. Tokens are drawn for `decode + joined`, in that order.

    decode: sequences that get a token (or several, with drafts). grown: those of them that own new blocks, with the
    place of the first. rooms: the position of each of `decode` from which on drafts are of no use to it.
    chunks: what to prefill. joined: sequences whose prefill is complete with their chunk. rows: decode and joined.
    """

    decode: list[Sequence]
    grown: list[tuple[Sequence, int]]
    rooms: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    joined: list[Sequence] = field(default_factory=list)
    rows: list[Sequence] = field(default_factory=list)


class Scheduler:
    """The queue, the running sequences, and the decisions about them."""

    def __init__(
        self,
        manager: BlockManager,
        *,
        block_size: int,
        max_batch: int,
        max_prefill_tokens: int,
        drafts: int = 0,
        lookahead: int = 0,
    ) -> None:
        """drafts: tokens drafted a step. lookahead: tokens behind a block that its content hangs on (MTP modules)."""
        self.manager = manager
        self.block_size = block_size
        self.max_batch = max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.drafts = drafts
        self.lookahead = lookahead
        self.waiting: deque[Sequence] = deque()
        self.admitted: dict[int, Sequence] = {}  # by request id, in order of admission
        self.decoding: list[Sequence] = []
        self.weights_version = 0
        self.preemptions = 0
        self.cached_prompt_tokens = 0
        self.prompt_tokens = 0
        self.drafted_steps = self.drafted_tokens = 0
        self.accepted_at = [0] * drafts  # how often the first draft of a step was accepted, the second, ...

    # A step ------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Decide the next step. Its blocks are taken and its sequences advanced as if it had been done."""
        preemptions = self.preemptions
        grown = self._grow()
        plan = Plan(self.decoding, grown, self._rooms(self.decoding))
        # Who admits right after it had to preempt would preempt again at the next step.
        self._fill(plan, admits=self.preemptions == preemptions)
        return plan

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """The step behind `plan`, before anybody knows what that draws; None where there is nothing to do for sure, not
        enough blocks for as many tokens as it may draw, or somebody's next draw hangs on what they are.

        Who reaches its limit with the first token that is not known yet is not in it. Who ends with that or a later one
        is in it all the same; `commit` passes it over.
        """
        rows = [s for s in plan.rows if s.request_id in self.admitted and len(s.tokens) + 1 < s.limit]
        unknown = 1 + self.drafts
        if any(sequence.controlled and not sequence.foreseen(unknown + 1) for sequence in rows):
            return None
        growing = self._outgrowing(rows, unknown)
        missing = [self._missing(sequence, min(len(sequence.tokens) + unknown, sequence.limit)) for sequence in growing]
        if self.manager.available < sum(missing):
            return None
        self._publish_generated()
        grown = self._lengthen(growing, missing)
        grown += self._lengthen_for_drafts(rows, unknown)
        ahead = Plan(rows, grown, self._rooms(rows))
        self._fill(ahead, admits=True)
        return ahead if ahead.rows or ahead.chunks else None

    def _fill(self, plan: Plan, admits: bool) -> None:
        """Add what is prefilled beside the decoding rows."""
        budget = self.max_prefill_tokens
        fresh: dict[int, int] = {}  # block that this step fills -> level of the chunk that fills it
        if len(self.admitted) > len(self.decoding):
            for sequence in self.admitted.values():
                if budget > 0 and not sequence.decoding and sequence.computed < len(sequence):
                    budget -= self._prefill(sequence, budget, 0, plan, fresh)
        while admits and budget > 0 and self.waiting and len(self.admitted) < self.max_batch:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            level = 1 + max((fresh.get(block, -1) for block in sequence.blocks), default=-1)
            budget -= self._prefill(sequence, budget, level, plan, fresh)
        plan.rows = plan.decode + plan.joined

    def commit(self, plan: Plan, drawn: list[list[Drawn]]) -> list[TokenEvent]:
        """Append the tokens drawn for each of `plan.rows`, and let go of the sequences that they finish.

        A row may have drawn several; those behind the one that ends its sequence are dropped. So is what was drawn for
        a sequence that ended, or was cancelled, after the step had been planned.
        """
        events = []
        rows = plan.rows
        ended = False
        for sequence, room, tokens in zip(plan.decode, plan.rooms, drawn, strict=False):
            if sequence.request_id in self.admitted:
                drafted = max(0, min(room - len(sequence), self.drafts))
                self.drafted_steps += drafted > 0
                self.drafted_tokens += drafted
                for place in range(len(tokens) - 1):
                    self.accepted_at[place] += 1
        for sequence, tokens in zip(rows, drawn, strict=True):
            if sequence.request_id not in self.admitted:
                ended = True
                continue
            for token in tokens:
                reason = sequence.append(token)
                events.append(
                    TokenEvent(
                        sequence.request_id,
                        token.token_id,
                        token.logprob,
                        reason,
                        sequence.cached_tokens,
                        token.score,
                        sequence.told_prompt_scores if len(sequence.logprobs) == 1 else None,
                        token.forced,
                        sequence.admitted_at,
                    )
                )
                if reason:
                    ended = True
                    self._let_go(sequence)
                    break
        for sequence in plan.joined:
            sequence.decoding = sequence.request_id in self.admitted
        self.decoding = [sequence for sequence in rows if sequence.decoding] if ended else rows
        return events

    def abandon_step(self) -> None:
        """After a step that failed half-way: nobody knows which blocks were written, so all is computed anew."""
        for sequence in reversed(self.admitted.values()):
            self._requeue(sequence)
        self.admitted.clear()
        self.decoding = []
        self.manager.forget()

    # From outside ------------------------------------------------------------------------------------

    def cancel(self, request_id: int) -> Sequence | None:
        """Forget a request at once; returns its sequence, or None when it is not (or no longer) here."""
        sequence = self.admitted.get(request_id)
        if sequence is not None:
            self._let_go(sequence)
            if sequence in self.decoding:
                self.decoding.remove(sequence)
            return sequence
        for sequence in self.waiting:
            if sequence.request_id == request_id:
                self.waiting.remove(sequence)
                return sequence
        return None

    def new_weights(self) -> None:
        """What is cached was computed with other weights: forget it, and compute running sequences anew."""
        self.weights_version += 1
        self.abandon_step()
        for sequence in self.waiting:
            sequence.digests.clear()

    # Blocks ------------------------------------------------------------------------------------------

    def _grow(self) -> list[tuple[Sequence, int]]:
        """Give a block to each decoding sequence whose last is full, preempting the latest admitted if it must; then
        blocks for drafts, while there are any. Returns who grew, with the place of the first new block."""
        growing = self._outgrowing(self.decoding, 0)
        while growing and self.manager.available < len(growing):
            victim = next(reversed(self.admitted.values()))
            self._preempt(victim)
            if victim in growing:
                growing.remove(victim)
        self._publish_generated()
        return self._lengthen(growing, [1] * len(growing)) + self._lengthen_for_drafts(self.decoding, 0)

    def _publish_generated(self) -> None:
        """Offer the blocks that generated tokens have filled."""
        for sequence in self.decoding:
            if (len(sequence.tokens) - max(1, self.lookahead)) // self.block_size > sequence.published:
                self._publish(sequence, len(sequence.tokens) - 1)

    def _lengthen(self, sequences: list[Sequence], counts: list[int]) -> list[tuple[Sequence, int]]:
        """Give each so many blocks; returns those that got any, with the place of the first."""
        lengthened = []
        for sequence, count in zip(sequences, counts, strict=True):
            if count:
                lengthened.append((sequence, len(sequence.blocks)))
                sequence.blocks += self.manager.allocate(count)
        return lengthened

    def _lengthen_for_drafts(self, sequences: list[Sequence], unknown: int) -> list[tuple[Sequence, int]]:
        """`_lengthen`, by what drafts need, while there are blocks. unknown: tokens that a step under way may add."""
        if not self.drafts:
            return []
        # What the modules write for drafts may lie up to 2 · drafts - lookahead positions behind the last token.
        ahead = unknown + 2 * self.drafts - self.lookahead
        lengthened = []
        for sequence in self._outgrowing(sequences, ahead):
            if sequence.speculative:
                missing = self._missing(sequence, min(len(sequence.tokens) + ahead, sequence.limit - 1))
                lengthened += self._lengthen([sequence], [min(missing, self.manager.available)])
        return lengthened

    def _outgrowing(self, sequences: list[Sequence], more: int) -> list[Sequence]:
        """Those whose blocks would not hold so many more tokens than they have."""
        size = self.block_size
        return [s for s in sequences if len(s.tokens) + more > len(s.blocks) * size]

    def _missing(self, sequence: Sequence, tokens: int) -> int:
        """How many blocks a sequence lacks for so many tokens."""
        return max(0, math.ceil(tokens / self.block_size) - len(sequence.blocks))

    def _rooms(self, sequences: list[Sequence]) -> list[int]:
        return [sequence.room(self.block_size) for sequence in sequences] if self.drafts else []

    def _admit(self, sequence: Sequence) -> bool:
        """Take blocks for all tokens of a waiting sequence, sharing what the cache knows. False: not enough room."""
        size = self.block_size
        # At least one token is always computed: its hidden state is what the first draw needs.
        matchable = max(0, len(sequence) - max(1, self.lookahead)) // size
        if sequence.params.prompt_scores is not None and not sequence.logprobs:
            matchable = 0  # scores are made of hidden states, which are not cached
        self._extend_digests(sequence, matchable)
        shared = self.manager.match(sequence.digests[:matchable])
        needed = math.ceil(len(sequence) / size) - len(shared)
        # One block for each running sequence stays free, so that they do not preempt the newcomer at once.
        if needed + len(self.admitted) > self.manager.available - self.manager.idle_among(shared):
            return False
        self.manager.share(shared)
        sequence.blocks = shared + self.manager.allocate(needed)
        sequence.computed = len(shared) * size
        sequence.published = len(shared)
        if not sequence.admitted_at:
            sequence.admitted_at = time.monotonic()
            sequence.cached_tokens = sequence.computed
            self.cached_prompt_tokens += sequence.computed
            self.prompt_tokens += sequence.prompt_length
        self.admitted[sequence.request_id] = sequence
        return True

    def _prefill(self, sequence: Sequence, budget: int, level: int, plan: Plan, fresh: dict[int, int]) -> int:
        """Plan the next chunk of an admitted sequence; returns its length."""
        start = sequence.computed
        end = min(len(sequence), start + budget)
        if len(sequence) - end < self.lookahead:
            end = len(sequence)  # MTP modules need the last `lookahead` tokens in one chunk
        plan.chunks.append(Chunk(sequence, start, end, level))
        sequence.computed = end
        if end == len(sequence):
            plan.joined.append(sequence)
        for block in self._publish(sequence, end):
            fresh[block] = level
        return end - start

    def _extend_digests(self, sequence: Sequence, blocks: int) -> None:
        """Digests of the first `blocks` blocks. A block's digest covers the tokens that its content hangs on."""
        size, digests = self.block_size, sequence.digests
        for index in range(len(digests), blocks):
            previous = digests[-1] if digests else root_digest(self.weights_version, sequence.adapter, sequence.salt)
            digests.append(block_digest(previous, sequence.tokens[index * size : (index + 1) * size + self.lookahead]))

    def _publish(self, sequence: Sequence, computed: int) -> list[int]:
        """Offer the blocks that the first `computed` tokens fill to other sequences; returns the new ones."""
        full = max(0, min(computed, len(sequence) - self.lookahead)) // self.block_size
        self._extend_digests(sequence, full)
        new = sequence.blocks[sequence.published : full]
        for block, digest in zip(new, sequence.digests[sequence.published : full], strict=True):
            self.manager.publish(block, digest)
        sequence.published = max(sequence.published, full)
        return new

    def _let_go(self, sequence: Sequence) -> None:
        """Release a sequence that ends (or pauses) in good order: what it computed stays known."""
        del self.admitted[sequence.request_id]
        self._publish(sequence, len(sequence) - 1 if sequence.decoding else min(sequence.computed, len(sequence) - 1))
        self.manager.release(sequence.blocks)
        sequence.blocks = []
        sequence.decoding = False

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.decoding:
            self.decoding.remove(sequence)
        self._let_go(sequence)
        sequence.computed = sequence.published = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _requeue(self, sequence: Sequence) -> None:
        self.manager.release(sequence.blocks)
        sequence.blocks = []
        sequence.decoding = False
        sequence.computed = sequence.published = 0
        self.waiting.appendleft(sequence)
