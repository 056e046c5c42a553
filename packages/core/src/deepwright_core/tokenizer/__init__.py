"""Text to ids and back: the tokenizer, how it is trained or loaded, and decoding one token at a time."""

from __future__ import annotations

from ..registry import Registry
from . import bpe, existing
from .conventions import Conventions
from .stream import StreamDecoder
from .tokenizer import Tokenizer

__all__ = ["Conventions", "StreamDecoder", "Tokenizer", "register"]


def register(registry: Registry) -> None:
    """Add the tokenizers `bpe` and `file`."""
    registry.add("tokenizer", "bpe", config=bpe.BpeConfig)(bpe.train)
    registry.add("tokenizer", "file", config=existing.FileTokenizerConfig)(existing.load)
