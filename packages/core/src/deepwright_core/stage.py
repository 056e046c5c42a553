"""What a stage is: a function from (validated config, input artifacts) to (output artifacts, metrics).

A stage knows nothing of workflows or trackers' servers. Its identity is the hash of the config sections that it
reads, the digests of its inputs and the version of the code: the same identity means the same result, so a finished
stage is reused and one that was cut off goes on in its own directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .registry import Registry
from .tracking import Progress, Tracker

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    outputs: artifact name -> path relative to the stage's directory.
    metrics: final numbers. `headline` tells which of them to show first, as (label, before, after).
    notes: what was learned, in a sentence or two with the figures.
    """

    outputs: Mapping[str, str]
    metrics: Mapping[str, float]
    headline: tuple[str, float | None, float | None] = ("", None, None)
    tokens: int = 0
    flops: float = 0.0
    notes: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "outputs": dict(self.outputs),
            "metrics": {key: float(value) for key, value in self.metrics.items()},
            "headline": list(self.headline),
            "tokens": int(self.tokens),
            "flops": float(self.flops),
            "notes": list(self.notes),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StageResult:
        """Back from JSON; `KeyError`, `TypeError` or `ValueError` when the record is not one."""
        label, before, after = record["headline"]
        return cls(
            record["outputs"],
            record["metrics"],
            (label, before, after),
            record["tokens"],
            record["flops"],
            tuple(record["notes"]),
        )


@dataclass
class StageContext:
    """What a stage is given beside its config: where to write, whom to tell, what to build with."""

    directory: Path
    tracker: Tracker
    progress: Progress
    registry: Registry
    hook: Any
    inputs: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage as registered under the kind "stage".

    sections: top-level keys of the composed config that change its result.
    needs: artifact name -> the stage that makes it.
    start: the artifact that is the model it starts from. Where `needs` has it, a given model (`model.init`) can stand
    in for it; where not, the stage makes a model from nothing unless it is given one.
    given: artifact name -> a directory that the config names; its content is part of the identity.
    run: (validated sections by name, context) -> StageResult.
    check: validated sections -> one sentence for each problem that no section shows alone.
    """

    name: str
    sections: tuple[str, ...]
    needs: Mapping[str, str]
    run: Callable[[Mapping[str, Any], StageContext], StageResult]
    check: Callable[[Mapping[str, Any]], list[str]] = lambda sections: []
    start: str = ""
    given: Mapping[str, Path] = field(default_factory=dict)


def identity(sections: Mapping[str, Any], input_digests: Mapping[str, str], code: Mapping[str, str]) -> str:
    """Hash of everything that decides a stage's result, as 64 hex digits."""
    text = json.dumps([sections, dict(input_digests), dict(code)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees either the old content or the new, never a part (also after a crash)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
