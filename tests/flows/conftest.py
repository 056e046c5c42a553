"""The toy plugin, installed as a stranger's distribution would be: for this process and for the commands it starts."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from deepwright_core.plugins import Plugins, discover, load
from deepwright_core.tracking import SilentProgress
from flows import mlflow_tracker, prefect_server, request, session

TOY = Path(__file__).parent / "toy"


class QuietDisplay(SilentProgress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, name: str) -> None:
        return

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        return


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What to put on the import path so that the toy plugin is an installed distribution."""
    folder = tmp_path_factory.mktemp("distributions")
    info = folder / "toy_for_deepwright-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-for-deepwright\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[deepwright]\ntoy = deepwright_toy\n")
    return [str(folder), str(TOY)]


@pytest.fixture(scope="module")
def plugins(toy_path: list[str]) -> Iterator[Plugins]:
    """Only the toy plugin; who asks for what is installed after these tests must not find it."""
    sys.path[:0] = toy_path
    try:
        yield load([entry for entry in discover() if entry.name == "toy"])
    finally:
        for entry in toy_path:
            sys.path.remove(entry)
    assert entry_points  # discovered by distribution, not by import


@pytest.fixture(autouse=True)
def toy_conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The toy's configuration, and a root of its own for each test."""
    monkeypatch.setenv("DEEPWRIGHT_CONF", str(TOY / "conf"))
    monkeypatch.setenv("DEEPWRIGHT_ROOT", str(tmp_path / "runs"))


@pytest.fixture
def quiet() -> type[QuietDisplay]:
    """Makes displays that remember what was said."""
    return QuietDisplay


@pytest.fixture
def go(plugins: Plugins) -> Callable[..., session.Report]:
    """Run a target in this process, without servers: `go("learn", "learn.steps=4")`."""

    def run(target: str, *overrides: str, display: QuietDisplay | None = None) -> session.Report:
        return session.run(request.make(target, overrides, plugins), plugins, display or QuietDisplay())

    return run


@pytest.fixture
def command_environment(toy_path: list[str], toy_conf: None) -> dict[str, str]:
    """The environment in which `deepwright` knows only the toy plugin."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(toy_path),
        "DEEPWRIGHT_BLOCK": "core,moe,mla,rl,serve",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with MLflow's tables: making them takes seconds, so it is done once and copied."""
    root = tmp_path_factory.mktemp("mlflow-root")
    mlflow_tracker.client_at(root, "").search_experiments()
    return (root / "mlflow" / "mlflow.db").read_bytes()


@pytest.fixture
def client(database: bytes, plugins: Plugins, tmp_path: Path) -> Any:
    """MLflow as runs below this test's root will find it."""
    folder = tmp_path / "runs" / "mlflow"
    folder.mkdir(parents=True)
    (folder / "mlflow.db").write_bytes(database)
    return mlflow_tracker.client_for(request.make("gather", ["tracking=mlflow"], plugins))


Deepwright = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def deepwright(command_environment: dict[str, str], tmp_path: Path) -> Deepwright:
    """The command: `deepwright("run", "learn")` returns the finished process."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            env={**command_environment, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return call


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all tests that need one."""
    before = dict(os.environ)
    try:
        with prefect_server.reachable(tmp_path_factory.mktemp("prefect-root")) as url:
            yield url
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
