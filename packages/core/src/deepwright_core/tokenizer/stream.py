"""Decoding one token at a time, for streaming.

A token may end in the middle of a character. The decoder holds such bytes back until the character is whole, so that
what it yields, put together, is the decoded text and never half a character.
"""

from __future__ import annotations

from .tokenizer import Tokenizer


class StreamDecoder:
    """`push` each token in order; it returns the text that became complete. `flush` gives what is left at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._stream = tokenizer.decoding.stream()

    def push(self, token_id: int) -> str:
        """Text that is complete with this token, possibly none."""
        return "" if token_id in self._skipped else self._stream.push(token_id)

    def flush(self) -> str:
        """What was still held back."""
        return self._stream.flush()
