"""From token ids to the text of one answer: thinking apart from content, stop strings cut, never half a character.

Thinking is told by token id: it begins with `<think>` (generated, or already in the prompt) and ends at `</think>`.
Text that merely looks like those tags stays text. Stop strings are looked for in the content only, so that they cannot
cut a thought short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepwright_core.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Delta:
    """What became known with a token."""

    reasoning: str = ""
    content: str = ""

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content)

    def __add__(self, other: Delta) -> Delta:
        return Delta(self.reasoning + other.reasoning, self.content + other.content)


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
    """One answer as it grows. Feed it each generated token, then `finish`."""

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), thinking: bool = False) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self.tokens = 0
        self.reasoning_tokens = 0
        self.reasoning = ""
        self.content = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met: nothing after it belongs to the answer."""
        return self._stops.found

    def push(self, token_id: int) -> Delta:
        """Take one token; returns the text that it made certain."""
        if self.stopped:
            return Delta()
        # Only an answer's first token opens a thought; a later one is noise.
        if token_id == self._tokenizer.think_start_id and self.tokens == 0:
            self._thinking = True
        self.tokens += 1
        self.reasoning_tokens += self._thinking
        delta = self._take(self._decoder.push(token_id))
        if token_id == self._tokenizer.think_end_id:
            self._thinking = False
        return delta

    def finish(self) -> Delta:
        """Everything still held back."""
        if self.stopped:
            return Delta()
        delta = self._take(self._decoder.flush())
        if self.stopped:
            return delta
        rest = self._stops.flush()
        self.content += rest
        return delta + Delta(content=rest)

    def _take(self, text: str) -> Delta:
        if self._thinking:
            self.reasoning += text
            return Delta(reasoning=text)
        text = self._stops.push(text)
        self.content += text
        return Delta(content=text)


class Continuation(Answer):
    """The text of a plain completion: no thinking is split off, its tags are written out."""

    def push(self, token_id: int) -> Delta:
        if self.stopped:
            return Delta()
        self.tokens += 1
        text = self._decoder.push(token_id)
        if token_id == self._tokenizer.think_start_id:
            text += "<think>"
        elif token_id == self._tokenizer.think_end_id:
            text += "</think>"
        return self._take(text)
