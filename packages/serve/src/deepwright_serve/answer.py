"""From token ids to the text of one answer: thinking and calls apart from content, stop strings cut, never half a
character.

Thinking is told by token id: it begins with `<think>` (generated, or already in the prompt) and ends at `</think>`.
Calls of tools are told in the same way, in answers that may hold some. Text that merely looks like those marks stays
text. Stop strings are looked for in the content only, so that they cannot cut a thought or a call short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from deepwright_core.engine import TokenScore
from deepwright_core.tokenizer import StreamDecoder, Tokenizer

from .calls import Call, CallPiece, CallReader


class Scored(NamedTuple):
    """A token's score, and where in the content its text begins, in characters."""

    score: TokenScore
    offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What became known with a token. scores: of the tokens whose text is now certain."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallPiece, ...] = ()
    scores: tuple[Scored, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls or self.scores)

    def __add__(self, other: Delta) -> Delta:
        return Delta(
            self.reasoning + other.reasoning,
            self.content + other.content,
            self.calls + other.calls,
            self.scores + other.scores,
        )


class StopStrings:
    """Passes text through up to the first stop string; holds back what might still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is now certain to be part of the answer."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            certain, self._held = self._held[: min(places)], ""
            return certain
        keep = max(self._overlap(stop) for stop in self._stops)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def flush(self) -> str:
        """What was held back, once nothing can follow."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that `stop` begins with."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


class Answer:
    """One answer as it grows. Feed it each generated token, then `finish`.

    thinking: whether the prompt has opened a thought. calls: whether the answer may call tools.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), thinking: bool = False, calls: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._begin_calls = tokenizer.marks["tool_calls_begin"] if calls else None
        self._reader: CallReader | None = None
        self._decoded = 0  # characters of content, those included that are held back
        self._pending: list[Scored] = []
        self.tokens = 0
        self.reasoning_tokens = 0
        self.reasoning = ""
        self.content = ""
        self.scores: list[Scored] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met: nothing after it belongs to the answer."""
        return self._stops.found

    @property
    def calls(self) -> list[Call]:
        """The calls so far."""
        return [] if self._reader is None else self._reader.calls

    def push(self, token_id: int, score: TokenScore | None = None) -> Delta:
        """Take one token; returns the text that it made certain."""
        if self.stopped:
            return Delta()
        # Only an answer's first token opens a thought; a later one is noise.
        if token_id == self._tokenizer.think_start_id and self.tokens == 0:
            self._thinking = True
        self.tokens += 1
        self.reasoning_tokens += self._thinking
        if self._reader is not None:
            return Delta(calls=self._reader.push(token_id))
        if token_id == self._begin_calls and not self._thinking:
            delta = self._rest_of_content()
            self._reader = CallReader(self._tokenizer)
            return delta
        if score is not None and self._counts(token_id):
            self._pending.append(Scored(score, self._decoded))
        delta = self._take(self._decoder.push(token_id))
        if token_id == self._tokenizer.think_end_id and self._thinking:
            # Half a character at the end of a thought does not become the answer's.
            delta += self._take(self._decoder.flush())
            self._thinking = False
        return delta

    def finish(self) -> Delta:
        """Everything still held back."""
        if self._reader is not None:
            return Delta(calls=self._reader.finish())
        return Delta() if self.stopped else self._rest_of_content()

    def _rest_of_content(self) -> Delta:
        delta = self._take(self._decoder.flush())
        if self.stopped or self._thinking:
            return delta
        rest = self._stops.flush()
        self.content += rest
        return delta + Delta(content=rest, scores=self._release(everything=True))

    def _counts(self, token_id: int) -> bool:
        """Whether a token belongs to the content: scores are given for no other."""
        return not self._thinking and token_id not in self._tokenizer.special_ids

    def _take(self, text: str) -> Delta:
        if self._thinking:
            self.reasoning += text
            return Delta(reasoning=text)
        self._decoded += len(text)
        text = self._stops.push(text)
        self.content += text
        return Delta(content=text, scores=self._release())

    def _release(self, everything: bool = False) -> tuple[Scored, ...]:
        """Scores of the tokens that have begun in the certain content; what a stop string cuts off gets none."""
        if not self._pending:
            return ()
        count = sum(everything or scored.offset < len(self.content) for scored in self._pending)
        released = tuple(self._pending[:count])
        del self._pending[:count]
        self.scores += released
        return released


# Marks of a conversation's turns; in the text of a completion, all others are written out.
TURNS = frozenset({"bos", "eos", "pad", "user", "assistant"})


class Continuation(Answer):
    """The text of a plain completion: nothing is split off, the marks of thinking and of tools are written out (as
    other programs do, whose tokenizers do not call them special), and every token counts."""

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, stops=stops)
        self._written = {i: tokenizer.spelling[mark] for mark, i in tokenizer.marks.items() if mark not in TURNS}

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenScore | None] = ()) -> Continuation:
        """A text that is there already: a prompt that is to stand before its continuation."""
        text = cls(tokenizer)
        for token, score in zip_longest(ids, scores[: len(ids)]):
            text.push(token, score)
        text.finish()
        return text

    def push(self, token_id: int, score: TokenScore | None = None) -> Delta:
        if self.stopped:
            return Delta()
        self.tokens += 1
        if score is not None:
            self._pending.append(Scored(score, self._decoded))
        return self._take(self._decoder.push(token_id) + self._written.get(token_id, ""))
