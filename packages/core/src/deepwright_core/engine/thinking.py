"""Control of thinking: a budget with a forced end, and a least length with forced continuation.

It is a state machine over the tokens of one answer, not a second request: each token leads from one `ThinkingState` to
the next, and the state says what the next draw is bound to. Forcing the end and suppressing it to append "Wait" are
the budget forcing of Muennighoff et al. 2025 (s1: simple test-time scaling, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import RequestError


class ThinkingState(NamedTuple):
    """inside: of thinking. thoughts: its tokens so far. queue: tokens to be forced next."""

    inside: bool
    thoughts: int = 0
    queue: tuple[int, ...] = ()


@dataclass(frozen=True)
class ThinkingControl:
    """How long an answer may and must think.

    end_id: the token that ends thinking. opened: whether the prompt ends inside of thinking. start_id: the token with
    which an answer opens thinking itself; None: it has none. budget: most thinking tokens (start_id, `closing` and
    end_id do not count); then `closing` and end_id are forced, and start_id cannot be drawn any more (with a budget of
    0: at all). least: while there are fewer thinking tokens, a drawn end of thinking or of the text is replaced by
    `continuation`, whose tokens count; without one, it cannot be drawn.
    """

    end_id: int
    opened: bool
    budget: int | None = None
    closing: tuple[int, ...] = ()
    least: int = 0
    continuation: tuple[int, ...] = ()
    start_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, all of them at once."""
        problems = []
        if self.budget is not None and self.budget < 0:
            problems.append(f"thinking.budget is {self.budget}; expected at least 0 tokens, or None for no limit.")
        if self.least < 0:
            problems.append(f"thinking.least is {self.least}; expected at least 0 tokens.")
        if self.budget is not None and self.least > self.budget:
            problems.append(
                f"thinking.least is {self.least} and thinking.budget is {self.budget}; expected least up to budget."
            )
        problems += [
            f"{name} holds token {token}; expected ids from 0." for name, token in self.named_tokens if token < 0
        ]
        if self.end_id in (self.start_id, *self.closing, *self.continuation):
            problems.append(
                f"thinking.end_id is {self.end_id}, which is also the start_id or in closing or continuation; expected "
                "a token of its own."
            )
        if problems:
            raise RequestError(problems)

    @property
    def named_tokens(self) -> list[tuple[str, int]]:
        """All of its tokens, each with the field that names it."""
        fields = {"end_id": (self.end_id,), "closing": self.closing, "continuation": self.continuation}
        if self.start_id is not None:
            fields["start_id"] = (self.start_id,)
        return [(f"thinking.{name}", token) for name, tokens in fields.items() for token in tokens]

    def start(self) -> ThinkingState:
        """The state of an answer that has no token yet."""
        return self._bounded(ThinkingState(self.opened))

    def after(self, state: ThinkingState, token: int, forced: bool) -> ThinkingState:
        """The state behind a token. forced: it was not drawn: it is the queue's, or replaced a drawn end."""
        inside, thoughts, queue = state
        if not inside:
            return self._bounded(ThinkingState(True, thoughts)) if token == self.start_id else state
        if token == self.end_id:
            return ThinkingState(False, thoughts)
        if self._closes(queue):
            return ThinkingState(True, thoughts, queue[1:])
        if queue:
            queue = queue[1:]
        elif forced:
            queue = self.continuation[1:]
        return self._bounded(ThinkingState(True, thoughts + 1, queue))

    def too_early(self, state: ThinkingState) -> bool:
        """Whether neither thinking nor the text may end yet."""
        return state.inside and not state.queue and state.thoughts < self.least

    def spent(self, state: ThinkingState) -> bool:
        """Whether no thinking token is left."""
        return self.budget is not None and state.thoughts >= self.budget

    def _bounded(self, state: ThinkingState) -> ThinkingState:
        """With the end in the queue when the budget is spent."""
        return state._replace(queue=(*self.closing, self.end_id)) if state.inside and self.spent(state) else state

    def _closes(self, queue: tuple[int, ...]) -> bool:
        return queue[-1:] == (self.end_id,)
