"""Control of thinking: a budget with a forced end, and a least length with forced continuation.

It is a state machine over the tokens of one answer, not a second request.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True)
class ThinkingControl:
    """How long an answer may and must think.

    end_id: the token that ends thinking. opened: whether the prompt ends inside of thinking. start_id: the token with
    which an answer opens thinking itself; None: it cannot. budget: most thinking tokens (start_id and end_id do not
    count); then `closing` and end_id are forced. With a budget of 0 an answer that the prompt did not open cannot draw
    start_id. least: while there are fewer thinking tokens, a drawn end of thinking or of the text is replaced by
    `continuation`; without one, it cannot be drawn. Forced tokens count as thinking, except for end_id and `closing`.
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
        ids = {"end_id": (self.end_id,), "closing": self.closing, "continuation": self.continuation}
        if self.start_id is not None:
            ids["start_id"] = (self.start_id,)
        problems += [
            f"thinking.{name} holds token {token}; expected ids from 0."
            for name, tokens in ids.items()
            for token in tokens
            if token < 0
        ]
        if self.end_id in (self.start_id, *self.closing, *self.continuation):
            problems.append(
                f"thinking.end_id is {self.end_id}, which is also the start_id or in closing or continuation; expected "
                "a token of its own."
            )
        if problems:
            raise RequestError(problems)
