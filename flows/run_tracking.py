"""How a run is remembered: one record for the run, one `Tracker` for each of its stages.

Here are the protocol and the two forms that need no server or database. MLflow's is in `mlflow_tracker`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deepwright_core.tracking import JsonlTracker, Tracker

from .request import Request

if TYPE_CHECKING:
    from .runner import Outcome

METRICS_FILE = "metrics.jsonl"


class StageTracking(Tracker, Protocol):
    """A stage's tracker, and the end of its story."""

    def reference(self) -> dict[str, str]:
        """What finds this record again; kept in the stage's result."""

    def address(self) -> str:
        """Where to look at it, or ""."""

    def flush(self) -> None:
        """Everything logged so far is safe after this."""

    def finish(self, record: Mapping[str, Any], directory: Path) -> None:
        """The stage is done; `record` is its result.json."""

    def fail(self, status: str = "FAILED") -> None:
        """The stage failed, or was stopped ("KILLED")."""


class RunTracking(Protocol):
    """The record of a whole run."""

    def start(self, request: Request, directory: Path, links: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """The run begins; `directory` holds its config and log."""

    def stage(
        self, name: str, identity: str, directory: Path, made_from: Mapping[str, Any], tags: Mapping[str, str]
    ) -> StageTracking:
        """A tracker for a stage; the same record goes on when the stage does."""

    def reused(self, name: str, identity: str, directory: Path, record: Mapping[str, Any]) -> str:
        """A stage was done before; returns the address of the record that it made then."""

    def finish(self, status: str, summary: str, outcomes: Sequence[Outcome]) -> None:
        """The run ends as "done", "failed" or "stopped"."""

    def address(self) -> str:
        """Where to look at the run, or ""."""


def _last_steps(path: Path) -> dict[str, int]:
    """Metric -> the last step logged, from an earlier attempt; a line cut off by a kill is passed over."""
    last: dict[str, int] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        for name in entry.keys() - {"step"} if "step" in entry else ():
            last[name] = max(entry["step"], last.get(name, entry["step"]))
    return last


class _PlainStage:
    """A stage's tracker that is a file in its directory. Steps that an earlier attempt logged are not repeated."""

    def __init__(self, directory: Path) -> None:
        path = directory / METRICS_FILE
        self._last = _last_steps(path)
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as file:
                file.write("\n")
        self._tracker = JsonlTracker(path)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        new = {name: value for name, value in values.items() if step > self._last.get(name, -1)}
        if new:
            self._tracker.metrics(new, step)

    def parameters(self, values: Mapping[str, Any]) -> None:
        self._tracker.parameters(values)

    def artifact(self, path: Path, folder: str = "") -> None:
        self._tracker.artifact(path, folder)

    def reference(self) -> dict[str, str]:
        return {}

    def address(self) -> str:
        return ""

    def flush(self) -> None:
        return

    def finish(self, record: Mapping[str, Any], directory: Path) -> None:
        return

    def fail(self, status: str = "FAILED") -> None:
        return


class _SilentStage(_PlainStage):
    """Remembers nothing."""

    def __init__(self) -> None:
        return

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        return

    def parameters(self, values: Mapping[str, Any]) -> None:
        return

    def artifact(self, path: Path, folder: str = "") -> None:
        return


class PlainTracking:
    """`tracking=jsonl` (each stage's metrics in its directory) and `tracking=none`."""

    def __init__(self, name: str) -> None:
        self._silent = name == "none"

    def start(self, request: Request, directory: Path, links: Mapping[str, str], tags: Mapping[str, str]) -> None:
        return

    def stage(
        self, name: str, identity: str, directory: Path, made_from: Mapping[str, Any], tags: Mapping[str, str]
    ) -> StageTracking:
        return _SilentStage() if self._silent else _PlainStage(directory)

    def reused(self, name: str, identity: str, directory: Path, record: Mapping[str, Any]) -> str:
        return ""

    def finish(self, status: str, summary: str, outcomes: Sequence[Outcome]) -> None:
        return

    def address(self) -> str:
        return ""


def of(request: Request) -> RunTracking:
    """The tracking that the config names."""
    if request.tracking.name == "mlflow":
        from .mlflow_tracker import MlflowTracking

        return MlflowTracking()
    return PlainTracking(request.tracking.name)


def attach(request: Request, reference: Mapping[str, str], directory: Path) -> StageTracking:
    """A stage's tracker in another process than the run's (`run.isolate`), from its `reference`."""
    if request.tracking.name == "mlflow":
        from .mlflow_tracker import MlflowStage

        return MlflowStage.attach(request, reference, directory)
    return _SilentStage() if request.tracking.name == "none" else _PlainStage(directory)
