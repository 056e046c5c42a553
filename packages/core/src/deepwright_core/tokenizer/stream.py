"""Decoding one token at a time, for streaming.

A byte-level token may end in the middle of a character. The decoder holds such bytes back until the character is
whole, so that what it yields, put together, is the decoded text and never half a character.
"""

from __future__ import annotations

import codecs

from .tokenizer import Tokenizer


class StreamDecoder:
    """`push` each token in order; it returns the text that became complete. `flush` gives what is left at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that is complete with this token, possibly none."""
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        return self._characters.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Bytes still held back never became a character: they show as the replacement character."""
        return self._characters.decode(b"", final=True)
