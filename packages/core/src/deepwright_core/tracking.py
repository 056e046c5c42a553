"""The two ways in which packages talk to the outside: a `Tracker` remembers, a `Progress` shows.

Both are protocols. `flows/` implements them with MLflow and rich; the versions here need nothing but a disk,
so that every package also works from a notebook or a script with no server anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Remembers what a stage did. Logging the same step twice must be harmless: a resumed stage repeats steps."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at an optimizer step."""

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Settings and facts that hold for the whole stage."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or directory to keep with the run."""


class Progress(Protocol):
    """Shows how far a stage is."""

    def start(self, description: str, total: int, completed: int = 0) -> None:
        """A new phase with `total` units of work, `completed` of them already done (after a resume)."""

    def advance(self, completed: int, note: str = "") -> None:
        """`completed` units are done now; `note` is a short line of current figures."""


class JsonlTracker:
    """Writes metrics to a JSON-lines file; parameters and artifacts stay where they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def parameters(self, values: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"parameters": dict(values)}, default=str) + "\n")

    def artifact(self, path: Path, folder: str = "") -> None:
        if not path.exists():
            raise FileNotFoundError(f"artifact {path} does not exist")


class SilentProgress:
    """Shows nothing."""

    def start(self, description: str, total: int, completed: int = 0) -> None:
        return

    def advance(self, completed: int, note: str = "") -> None:
        return
