"""Plain text files, cut into documents.

A long file becomes several documents, cut at line ends, so that a corpus that is one file can be split too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ..errors import RequestError
from .document import Document, Dropped, TextSplit
from .files import FilesConfig, bounded, paths_of


class TextConfig(FilesConfig):
    """Plain UTF-8 text files, by path or glob.

    document_bytes: a longer file is cut at line ends into documents of about this size.
    """

    name: Literal["text"] = "text"
    document_bytes: int = Field(32_768, ge=256)


def read(config: TextConfig) -> Iterator[Document | Dropped]:
    """Plain UTF-8 text files; a long one is cut at line ends."""
    return bounded(_pieces(config), config.validation_share, config.max_bytes)


def _pieces(config: TextConfig) -> Iterator[tuple[str, str, TextSplit | None]]:
    for path, split in paths_of(config, (".txt", ".md", ".rst")):
        piece: list[str] = []
        size = 0
        try:
            with path.open(encoding="utf-8", newline="") as file:
                # A line longer than a document is cut where it stands.
                while line := file.readline(config.document_bytes):
                    if size and size + len(line) > config.document_bytes:
                        yield "".join(piece), str(path), split
                        piece, size = [], 0
                    piece.append(line)
                    size += len(line)
        except UnicodeDecodeError as error:
            raise RequestError(
                f"data: {path} is not UTF-8 ({error.reason} near byte {error.start} of a block); convert or remove it."
            ) from error
        if piece:
            yield "".join(piece), str(path), split
