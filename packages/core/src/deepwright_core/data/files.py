"""What the sources that read files share: options, finding the files, and choosing a document's split."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field

from ..errors import RequestError
from ..registry import ComponentConfig
from .document import Document, Dropped, TextSplit, normalised, split_by_hash


class FilesConfig(ComponentConfig):
    """Options of every source that reads files.

    path: a file, a folder or a glob pattern (`**` goes into folders).
    validation_path: the same for validation; without it, documents are split by the hash of their text.
    validation_share: share of the documents that goes to validation when there is no validation_path.
    max_bytes: how much text to take at most; null takes everything.
    """

    path: str
    validation_path: str | None = None
    validation_share: float = Field(0.05, gt=0, lt=1)
    max_bytes: int | None = Field(None, ge=1)


def find(pattern: str, suffixes: tuple[str, ...], field: str) -> list[Path]:
    """Files that a path, folder or glob names, in sorted order; none at all is a wrong request."""
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        found = [path for path in Path(expanded).rglob("*") if path.name.endswith(suffixes)]
        wanted = f"a folder holding files that end in {' or '.join(suffixes)}"
    else:
        found = [Path(path) for path in glob.glob(expanded, recursive=True)]
        wanted = "an existing file, a folder, or a pattern that matches files"
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise RequestError(
            f"{field} is '{pattern}', which matches no file; expected {wanted} (relative to {Path.cwd()})."
        )
    return files


def paths_of(config: FilesConfig, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, TextSplit | None]]:
    """Every file with the split that its option fixes; None means that each document's text decides.

    Validation comes first: a bound on the bytes must not leave it empty.
    """
    train = find(config.path, suffixes, "data.path")
    if config.validation_path is not None:
        for path in find(config.validation_path, suffixes, "data.validation_path"):
            yield path, "validation"
    for path in train:
        yield path, None if config.validation_path is None else "train"


def bounded(
    texts: Iterable[tuple[str, str, TextSplit | None]], share: float, max_bytes: int | None
) -> Iterator[Document | Dropped]:
    """(text, source, fixed split) to documents, until the bound is reached. One note says where it was reached."""
    taken = 0
    for text, source, fixed in texts:
        if not text.strip():
            yield Dropped(source, "empty")
            continue
        taken += len(text.encode())
        if max_bytes is not None and taken > max_bytes:
            yield Dropped(source, "beyond data.max_bytes, this document and all after it")
            return
        yield Document(text, source, fixed or split_by_hash(normalised(text), share))
