"""The command as a user types it, each test with a root of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "deepwright"), *arguments]


def environment() -> dict[str, str]:
    """Without the workflow server's address: each run finds or starts its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DEEPWRIGHT_"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def run_in(folder: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder to its end; its output is on the result."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment(), cwd=folder
    )


@pytest.fixture
def deepwright(tmp_path: Path) -> Run:
    """Run a command in the test's own folder."""
    return partial(run_in, tmp_path)
