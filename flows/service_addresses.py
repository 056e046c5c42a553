"""Where `deepwright up` says which servers it runs, so that runs started elsewhere use them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from deepwright_core.stage import write_atomically

FILE = "up.json"


@dataclass(frozen=True)
class Addresses:
    """The servers of one `deepwright up`, and the process that runs them."""

    pid: int
    started: float
    prefect: str
    mlflow: str

    @property
    def prefect_api(self) -> str:
        return f"{self.prefect}/api"


def write(root: Path, prefect: str, mlflow: str) -> None:
    """Say that this process runs these servers."""
    me = psutil.Process()
    write_atomically(root / FILE, json.dumps(asdict(Addresses(os.getpid(), me.create_time(), prefect, mlflow))))


def remove(root: Path) -> None:
    """They are gone."""
    (root / FILE).unlink(missing_ok=True)


def running(root: Path) -> Addresses | None:
    """The servers that are up, if the process that runs them is still the one that wrote the file."""
    try:
        addresses = Addresses(**json.loads((root / FILE).read_text()))
        process = psutil.Process(addresses.pid)
        return addresses if abs(process.create_time() - addresses.started) < 1 else None
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
