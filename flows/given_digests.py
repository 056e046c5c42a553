"""Digests of directories that a run was given: their content is part of a stage's identity.

A digest is the same as if a stage had made the directory, so that a copy of a stage's output stands for the output.
Files are read once: what was found is kept by path, size and time of change in `<root>/given.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepwright_core.errors import RequestError
from deepwright_core.stage import file_digest, write_atomically

from . import fingerprint

FILE = "given.json"


def digest_of(directory: Path, root: Path) -> str:
    """One digest for the names and contents of all files of a directory."""
    if not directory.is_dir():
        raise RequestError(f"{directory} is no directory any more.")
    known = _known(root)
    entries: dict[str, dict[str, Any]] = {}
    new = False
    for file in fingerprint.files_of(directory):
        stat = file.stat()
        entry = known.get(str(file))
        if entry is None or (entry.get("size"), entry.get("changed")) != (stat.st_size, stat.st_mtime_ns):
            entry = {"size": stat.st_size, "changed": stat.st_mtime_ns, "sha256": file_digest(file)}
            known[str(file)], new = entry, True
        entries[file.relative_to(directory).as_posix()] = entry
    if new:
        write_atomically(root / FILE, json.dumps(known, indent=1))
    return fingerprint.digest_of(entries)


def _known(root: Path) -> dict[str, dict[str, Any]]:
    """What was found before; a file that cannot be read is as good as none."""
    try:
        known = json.loads((root / FILE).read_text())
        return {path: entry for path, entry in known.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}
