"""What a source yields: documents, and notes of what it left out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

TextSplit = Literal["train", "validation"]
TEXT_SPLITS: tuple[TextSplit, ...] = ("train", "validation")


@dataclass(frozen=True)
class Document:
    """A text, the file or dataset it came from, and the split it belongs to."""

    text: str
    source: str
    split: TextSplit


@dataclass(frozen=True)
class Dropped:
    """Something that a source did not take, and why. A source yields these among its documents."""

    source: str
    reason: str


def split_by_hash(key: str, validation_share: float) -> TextSplit:
    """The split of whatever `key` names: the same on every machine and for every order of files."""
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "validation" if position < validation_share else "train"


def normalised(text: str) -> str:
    """A text as deduplication sees it: white space of any kind and length is one space."""
    return " ".join(text.split())
