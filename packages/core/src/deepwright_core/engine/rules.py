"""What the next token of one answer is bound to: by its least length, its thinking control and its grammar.

This is the host's part, plain Python over tokens; `controls` does to the logits what it says.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ..errors import RequestError
from .grammar import set_bits

if TYPE_CHECKING:
    from .sequence import SamplingParams


class Bounds(NamedTuple):
    """Of one draw.

    forced: the token that comes whatever is drawn. banned: tokens that cannot be drawn. banned_for_good: nor in any
    later draw. replaced: tokens instead of which, when they are drawn, `instead` comes. allowed_W: a grammar's mask
    (`grammar`), from which banned ones are gone.
    """

    forced: int | None = None
    banned: frozenset[int] = frozenset()
    banned_for_good: frozenset[int] = frozenset()
    replaced: frozenset[int] = frozenset()
    instead: int | None = None
    allowed_W: np.ndarray | None = None


FREE = Bounds()


class Rules:
    """The rules of an answer and where it stands in them. It sees each of its tokens once, in order.

    `RequestError` when no answer can begin as its grammar says.
    """

    def __init__(self, params: SamplingParams, stop_ids: frozenset[int]) -> None:
        self._stop_ids = stop_ids
        self._least = params.min_tokens
        self._tokens = 0
        self._control = params.thinking
        self._thinking = params.thinking.start() if params.thinking is not None else None
        self._grammar = params.grammar.start() if params.grammar is not None else None
        if self._grammar is not None and self._grammar.stuck:
            raise RequestError(f"The grammar cannot be used: {self._grammar.reason}.")

    def bounds(self) -> Bounds:
        """Of the next draw."""
        none = frozenset[int]()
        ends, for_good = self._stop_ids if self._tokens < self._least else none, none
        control, thinking = self._control, self._thinking
        if control is not None and thinking is not None:
            if thinking.queue:
                return Bounds(forced=thinking.queue[0])
            if thinking.inside:
                # An answer that owes a text of its grammar cannot end while it thinks.
                banned = ends if self._grammar is None else self._stop_ids
                if not control.too_early(thinking):
                    return Bounds(banned=banned)
                replaced = self._stop_ids | {control.end_id}
                if control.continuation:
                    return Bounds(replaced=replaced, instead=control.continuation[0])
                return Bounds(banned=replaced)
            if control.start_id is not None and control.spent(thinking):
                for_good = frozenset({control.start_id})
        if self._grammar is None:
            return Bounds(banned=ends, banned_for_good=for_good)
        allowed_W = self._grammar.allowed_W.copy()
        if self._grammar.accepting:
            set_bits(allowed_W, self._stop_ids, True)
        if control is not None and control.start_id is not None and not self._tokens:
            set_bits(allowed_W, [control.start_id], True)
        bounded_W = allowed_W.copy()
        set_bits(bounded_W, ends | for_good, False)
        # Where the grammar leaves only what may not end yet, the grammar has its way: something must be drawn.
        return Bounds(allowed_W=bounded_W if bounded_W.any() else allowed_W)

    @property
    def free_draws(self) -> float:
        """How many draws from here on, whatever they give, are bound to nothing but what is banned for good."""
        if self._tokens < self._least or self._grammar is not None:
            return 0
        control, thinking = self._control, self._thinking
        if control is None or thinking is None:
            return math.inf
        if not thinking.inside and (control.start_id is None or control.spent(thinking)):
            return math.inf
        if thinking.queue or thinking.thoughts < control.least:
            return 0  # a least length would bind what follows a drawn start_id, too
        return math.inf if control.budget is None else control.budget - thinking.thoughts

    def take(self, token: int, forced: bool) -> Literal["stop", "length"] | None:
        """Go on behind a token; why the answer cannot: its text is complete, or a limit of its grammar was reached."""
        self._tokens += 1
        thought = False
        if self._control is not None and self._thinking is not None:
            before = self._thinking
            self._thinking = self._control.after(before, token, forced)
            thought = before.inside or self._thinking.inside
        if self._grammar is None or thought or token in self._stop_ids:
            return None
        self._grammar.advance(token)
        if not self._grammar.stuck:
            return None
        return "stop" if self._grammar.accepting else "length"
