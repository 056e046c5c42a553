"""What an answer may look like: a grammar, compiled for a tokenizer."""

from __future__ import annotations


class Grammar:
    """A compiled grammar, which any number of requests may share."""
