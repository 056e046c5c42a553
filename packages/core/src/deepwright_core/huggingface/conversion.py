"""Doing a conversion: step after step into a directory aside, which takes its name when all is done.

A conversion that is cut off leaves `.<name>.partial` and goes on there when the same command is given again:
`done.json` says how many steps lie on the disk, and for which source and options. Input that turns out to be bad
leaves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError, WorkError
from ..model.config import ModelConfig
from ..model.tensor_files import NAME_OF
from ..stage import write_atomically
from ..tracking import Progress
from .streaming_files import Planned, StreamingFiles

DONE_FILE = "done.json"
SAVE_EVERY_BYTES = 2**30


@dataclass(frozen=True)
class Step:
    """A part of the work: `bytes` that it writes, and what writes them."""

    bytes: int
    run: Callable[[StreamingFiles], None]


@dataclass(frozen=True)
class Plan:
    """What a conversion will do. `made_from` is everything that decides its result; `files` are the small ones."""

    tensors: Sequence[Planned]
    steps: Sequence[Step]
    files: Mapping[str, bytes]
    made_from: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def digest(self) -> str:
        text = json.dumps([dict(self.made_from), [[t.name, str(t.dtype), list(t.shape)] for t in self.tensors]])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Converted:
    """What a conversion did, or would do in a dry run.

    format: of the published side. config: of our model. dtypes counts the written tensors by dtype; `notes` are
    sentences for the user.
    """

    format: str
    config: ModelConfig
    tensors_read: int
    tensors_written: int
    bytes: int
    dtypes: Mapping[str, int]
    notes: tuple[str, ...]

    @classmethod
    def by(cls, plan: Plan, format: str, config: ModelConfig, tensors_read: int, notes: Sequence[str]) -> Converted:
        dtypes = dict(Counter(NAME_OF[tensor.dtype] for tensor in plan.tensors))
        return cls(format, config, tensors_read, len(plan.tensors), plan.bytes, dtypes, tuple(notes))


def fingerprint(paths: Sequence[Path]) -> list[list[Any]]:
    """Names, sizes and times of files: enough to notice that a source has changed under a cut-off conversion."""
    return [[path.name, (status := path.stat()).st_size, status.st_mtime_ns] for path in paths]


def refuse_existing(destination: Path) -> None:
    """Nothing is ever overwritten."""
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        raise RequestError(f"{destination} exists already and is not overwritten; name another directory or remove it.")
    if destination.parent.exists() and not destination.parent.is_dir():
        raise RequestError(f"{destination.parent} is a file; the destination must lie in a directory.")


def partial_directory(destination: Path) -> Path:
    """Where a conversion lies until it is complete."""
    return destination.with_name(f".{destination.name}.partial")


def run(plan: Plan, destination: Path, progress: Progress, most_bytes: int) -> None:
    """Carry out a plan. Raises `RequestError` before it starts when there is no room or the way is barred."""
    destination = destination.absolute()
    refuse_existing(destination)
    partial = partial_directory(destination)
    done = _done_before(partial, plan)
    _require_room(partial, plan)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(partial / DONE_FILE, json.dumps({"digest": plan.digest, "steps": done}))
    files = StreamingFiles(partial, plan.tensors, most_bytes)
    try:
        _do(plan, files, partial, done, progress)
        files.finish()
        for name, content in plan.files.items():
            write_atomically(partial / name, content)
        (partial / DONE_FILE).unlink()
        _publish(partial, destination)
    except RequestError:
        shutil.rmtree(partial, ignore_errors=True)  # the source is bad: what was made of it is worth nothing
        raise
    except OSError as error:
        raise WorkError(
            f"{partial} cannot be written: {error.strerror or error}. "
            "When that is mended, give the same command again; it goes on where it stopped."
        ) from error


def _do(plan: Plan, files: StreamingFiles, partial: Path, done: int, progress: Progress) -> None:
    written = sum(step.bytes for step in plan.steps[:done])
    progress.start("tensors", len(plan.steps), done)
    unsaved = 0
    try:
        for step in plan.steps[done:]:
            step.run(files)
            done += 1
            written += step.bytes
            unsaved += step.bytes
            if unsaved >= SAVE_EVERY_BYTES:
                _save(plan, files, partial, done)
                unsaved = 0
            progress.advance(done, f"{written / 1e6:,.0f} of {plan.bytes / 1e6:,.0f} MB")
    except KeyboardInterrupt:
        _save(plan, files, partial, done)
        raise


def _save(plan: Plan, files: StreamingFiles, partial: Path, done: int) -> None:
    files.sync()
    write_atomically(partial / DONE_FILE, json.dumps({"digest": plan.digest, "steps": done}))


def _done_before(partial: Path, plan: Plan) -> int:
    """How many steps of this very plan lie in a partial directory."""
    if not partial.exists():
        return 0
    try:
        record = json.loads((partial / DONE_FILE).read_text())
        digest, steps = record["digest"], int(record["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        digest, steps = None, 0
    if digest != plan.digest:
        raise RequestError(
            f"{partial} is left from another conversion (its source or its options were others); remove it first."
        )
    return min(steps, len(plan.steps))


def _require_room(partial: Path, plan: Plan) -> None:
    place = next(parent for parent in (partial, *partial.parents) if parent.exists())
    there = sum(path.stat().st_blocks * 512 for path in partial.iterdir()) if partial.exists() else 0
    needed = plan.bytes + sum(len(content) for content in plan.files.values()) - there
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RequestError(
            f"{place} has {free / 2**30:.1f} GiB free; the result takes {needed / 2**30:.1f} GiB more. "
            "Make room or name a destination on another disk."
        )


def _publish(partial: Path, destination: Path) -> None:
    if destination.is_dir():
        destination.rmdir()  # it was empty
    os.replace(partial, destination)
    descriptor = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
