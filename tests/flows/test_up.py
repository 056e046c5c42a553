"""`deepwright up` as a whole: servers and worker start, a run asked for in the form is carried out, all of it stops."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for listener in (first, second):
            listener.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def wait(what: str, ready: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = ready()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen in {seconds:.0f} s")


Up = tuple["subprocess.Popen[bytes]", dict[str, str]]


@pytest.fixture
def up(command_environment: dict[str, str], tmp_path: Path) -> Iterator[Up]:
    root = tmp_path / "runs"
    ports = free_ports()
    with (tmp_path / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "flows.cli", "up", "--root", str(root)),
                *("--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])),
            ],
            env=command_environment,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    try:
        wait("up", lambda: process.poll() is not None or b"Ctrl-C stops" in (tmp_path / "up.log").read_bytes())
        assert process.poll() is None, (tmp_path / "up.log").read_text()
        yield process, json.loads((root / "up.json").read_text())
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_asked_for_in_the_form_is_carried_out_and_everything_stops(up: Up, tmp_path: Path) -> None:
    process, addresses = up
    api = f"{addresses['prefect']}/api"
    deployment = httpx.get(f"{api}/deployments/name/pipeline/local").json()
    fields = deployment["parameter_openapi_schema"]["properties"]
    assert fields["experiment"]["enum"] == ["", "slow"] and fields["overrides"]["type"] == "array"
    for name in ("gather", "learn", "judge"):
        assert httpx.get(f"{api}/deployments/name/{name}/local").status_code == 200
    automations = httpx.post(f"{api}/automations/filter", json={}).json()
    assert any("silent" in automation["name"] for automation in automations)

    asked = httpx.post(
        f"{api}/deployments/{deployment['id']}/create_flow_run",
        json={
            "parameters": {
                "overrides": ["run.workflow=prefect", "tracking=mlflow", "learn.steps=6"],
                "experiment": "slow",
            },
            "state": {"type": "SCHEDULED", "state_details": {}},
        },
    ).json()

    def state() -> str:
        found: str = httpx.get(f"{api}/flow_runs/{asked['id']}").json()["state_type"]
        return found

    wait("the run", lambda: state() in {"COMPLETED", "FAILED", "CRASHED"})
    assert state() == "COMPLETED", (tmp_path / "runs" / "logs" / "worker.log").read_text()
    (result,) = (tmp_path / "runs" / "stages").glob("learn-*/result.json")
    assert json.loads(result.read_text())["metrics"] == {"total": 15.0}
    tracked = httpx.post(
        f"{addresses['mlflow']}/api/2.0/mlflow/runs/search",
        json={"experiment_ids": ["1"], "filter": f"tags.`prefect.flow_run_id` = '{asked['id']}'"},
    ).json()["runs"]
    assert [run["info"]["status"] for run in tracked] == ["FINISHED"]

    # Cancelled there, the work ends here.
    slow = httpx.get(f"{api}/deployments/name/learn/local").json()
    asked = httpx.post(
        f"{api}/deployments/{slow['id']}/create_flow_run",
        json={
            "parameters": {
                "overrides": ["run.workflow=prefect", "learn.pause=0.2", "learn.steps=900", "learn.every=1"]
            },
            "state": {"type": "SCHEDULED", "state_details": {}},
        },
    ).json()
    stages = tmp_path / "runs" / "stages"
    wait("work", lambda: len(list(stages.glob("learn-*/checkpoints/latest.json"))) == 2)
    httpx.post(f"{api}/flow_runs/{asked['id']}/set_state", json={"state": {"type": "CANCELLING"}})
    wait("the end of the run", lambda: state() == "CANCELLED")

    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not (tmp_path / "runs" / "up.json").exists()
