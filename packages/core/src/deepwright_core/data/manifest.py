"""Reading a source once: duplicates out, documents to the disk, and a record of everything that was seen.

The documents wait in one JSON-lines file for each split, so that a corpus need not fit into memory: the tokenizer
reads them to learn and again to encode. Duplicates are found by the hash of the text with its white space normalised;
the first copy stays, so that no text can be in train and in validation too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tracking import Progress, SilentProgress
from .document import TEXT_SPLITS, Document, Dropped, TextSplit, normalised

# Names of dropped documents listed for each reason; the counts are always complete.
NAMES_LISTED = 100


@dataclass
class _File:
    documents: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


@dataclass
class Manifest:
    """Files, bytes, digests and counts for each split, and what was dropped and why."""

    files: dict[tuple[str, TextSplit], _File] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    dropped_counts: dict[str, int] = field(default_factory=dict)

    def take(self, document: Document) -> None:
        data = document.text.encode()
        file = self.files.setdefault((document.source, document.split), _File())
        file.documents += 1
        file.bytes += len(data)
        # Length first: otherwise two documents and their concatenation would have one digest.
        file.digest.update(len(data).to_bytes(8, "big") + data)

    def drop(self, source: str, reason: str) -> None:
        self.dropped_counts[reason] = self.dropped_counts.get(reason, 0) + 1
        names = self.dropped.setdefault(reason, [])
        if len(names) < NAMES_LISTED:
            names.append(source)

    def documents(self, split: TextSplit) -> int:
        return sum(file.documents for (_, at), file in self.files.items() if at == split)

    def bytes(self, split: TextSplit) -> int:
        return sum(file.bytes for (_, at), file in self.files.items() if at == split)

    def as_json(self) -> dict[str, Any]:
        """Plain data, in the order of names, so that equal corpora have equal manifests."""
        splits: dict[str, Any] = {}
        for split in TEXT_SPLITS:
            own = {source: file for (source, at), file in sorted(self.files.items()) if at == split}
            total = hashlib.sha256()
            for source, file in own.items():
                total.update(f"{source}\n{file.digest.hexdigest()}\n".encode())
            splits[split] = {
                "files": len(own),
                "documents": self.documents(split),
                "bytes": self.bytes(split),
                "sha256": total.hexdigest(),
            }
        return {
            "splits": splits,
            "dropped": {
                reason: {"count": self.dropped_counts[reason], "names": self.dropped[reason]}
                for reason in sorted(self.dropped_counts)
            },
            "files": [
                {
                    "source": source,
                    "split": split,
                    "documents": file.documents,
                    "bytes": file.bytes,
                    "sha256": file.digest.hexdigest(),
                }
                for (source, split), file in sorted(self.files.items())
            ],
        }


def collect(source: Iterable[Document | Dropped], directory: Path, progress: Progress | None = None) -> Manifest:
    """Read a source to its end into `directory`/{train,validation}.jsonl; returns the record of it."""
    progress = progress or SilentProgress()
    progress.start("reading text", 1)
    directory.mkdir(parents=True, exist_ok=True)
    manifest = Manifest()
    seen: set[bytes] = set()
    taken = 0
    files = {split: (directory / f"{split}.jsonl").open("w", encoding="utf-8") for split in TEXT_SPLITS}
    try:
        for item in source:
            if isinstance(item, Dropped):
                manifest.drop(item.source, item.reason)
                continue
            digest = hashlib.sha256(normalised(item.text).encode()).digest()[:16]
            if digest in seen:
                manifest.drop(item.source, "duplicate")
                continue
            seen.add(digest)
            manifest.take(item)
            files[item.split].write(json.dumps(item.text, ensure_ascii=False) + "\n")
            taken += 1
            if taken % 256 == 0:
                progress.advance(0, f"{taken} documents")
    finally:
        for file in files.values():
            file.close()
    progress.advance(1, f"{taken} documents")
    return manifest


def texts(directory: Path, split: TextSplit) -> Iterator[str]:
    """The texts that `collect` kept, in order."""
    with (directory / f"{split}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
