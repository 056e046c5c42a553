"""A tokenizer that already exists: any directory with a tokenizer.json.

The chat form is always ours, because training data is written in it: marks that the tokenizer lacks are added behind
its last id; its own names for begin, end and padding are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ..registry import ComponentConfig
from .tokenizer import Tokenizer


class FileTokenizerConfig(ComponentConfig):
    """A tokenizer read from a directory with a tokenizer.json.

    path: the directory.
    """

    name: Literal["file"] = "file"
    path: str


def load(config: FileTokenizerConfig, documents: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer read from a directory with a tokenizer.json."""
    del documents  # nothing is learnt
    return Tokenizer.load(Path(config.path).expanduser()).with_chat_form()
