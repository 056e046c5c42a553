"""A part of a conversation as tokens see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A special token by its spelling, or plain text. learn: the assistant wrote it."""

    special: str | None = None
    text: str = ""
    learn: bool = False
