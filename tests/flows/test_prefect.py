"""Runs as Prefect sees them: a flow, a subflow and a task for each stage, and what the pages of a run show."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import form_fields, service_addresses

Deepwright = Callable[..., subprocess.CompletedProcess[str]]


def ask(api: str, what: str, **filters: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{api}/{what}/filter", json=filters, timeout=30)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()
    return found


def newest(api: str, flow: str) -> dict[str, Any]:
    runs = ask(api, "flow_runs", flows={"name": {"any_": [flow]}}, sort="START_TIME_DESC")
    return runs[0]


def test_a_run_is_a_flow_with_a_subflow_for_each_stage(prefect_api: str, deepwright: Deepwright) -> None:
    overrides = ["run.workflow=prefect", "learn.steps=6"]
    done = deepwright("run", "pipeline", *overrides, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert "0 → 15" in done.stdout and "prefect" not in done.stderr.lower()
    run = newest(prefect_api, "pipeline")
    assert run["state_type"] == "COMPLETED"
    assert run["parameters"]["overrides"] == overrides
    for stage in ("gather", "learn", "judge"):
        assert newest(prefect_api, f"{stage} stage")["state_type"] == "COMPLETED"
    summaries = ask(prefect_api, "artifacts", artifacts={"key": {"any_": ["summary"]}})
    (summary,) = [artifact for artifact in summaries if artifact["flow_run_id"] == run["id"]]
    assert "| learn | done |" in summary["data"]
    logs = ask(prefect_api, "logs", logs={"flow_run_id": {"any_": [run["id"]]}})
    assert any("learn" in line["message"] and "0 → 15" in line["message"] for line in logs)
    tasks = ask(prefect_api, "task_runs", flow_runs={"id": {"any_": [newest(prefect_api, "learn stage")["id"]]}})
    assert [t["state_name"] for t in tasks] == ["Completed"]

    again = deepwright("run", "pipeline", *overrides, PREFECT_API_URL=prefect_api)
    assert again.returncode == 0 and again.stderr.count("reused") == 3
    tasks = ask(prefect_api, "task_runs", flow_runs={"id": {"any_": [newest(prefect_api, "learn stage")["id"]]}})
    assert [t["state_name"] for t in tasks] == ["Cached"]


def test_failures_and_wrong_requests_end_the_flow_as_they_end_the_command(
    prefect_api: str, deepwright: Deepwright
) -> None:
    failed = deepwright("run", "learn", "run.workflow=prefect", "learn.fail=crash", PREFECT_API_URL=prefect_api)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "deepwright: learn failed: ValueError: the numbers do not add up" in failed.stderr
    assert newest(prefect_api, "learn")["state_type"] == "FAILED"
    assert "do not add up" in newest(prefect_api, "learn")["state"]["message"]


def test_a_choice_of_the_form_is_an_override() -> None:
    assert form_fields.overrides_for(experiment="smoke", model="", attention="mla") == [
        "experiment=smoke",
        "model/attention=mla",
    ]


@pytest.mark.parametrize("field", list(form_fields.GROUPS))
def test_every_field_of_the_form_has_a_group(field: str) -> None:
    assert form_fields.overrides_for(**{field: "x"}) == [f"{form_fields.GROUPS[field]}=x"]


LONG = ("run", "learn", "run.workflow=prefect", "learn.pause=0.05", "learn.steps=2000", "learn.every=1")


@pytest.fixture
def long_run(
    prefect_api: str, command_environment: dict[str, str], tmp_path: Path
) -> Iterator["subprocess.Popen[str]"]:
    """A run that is in the middle of its work; it finds the server as it would find that of `deepwright up`."""
    service_addresses.write(tmp_path / "runs", prefect_api.removesuffix("/api"), "http://127.0.0.1:1")
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *LONG],
        env=command_environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "runs").glob("stages/learn-*/checkpoints/latest.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_stops_the_flow_and_leaves_nothing_running(prefect_api: str, long_run: "subprocess.Popen[str]") -> None:
    long_run.send_signal(signal.SIGINT)
    _, errors = long_run.communicate(timeout=60)
    assert long_run.returncode == 130
    assert errors.splitlines()[-1] == "deepwright: stopped. The same command goes on from the last checkpoint."
    assert "Traceback" not in errors
    assert newest(prefect_api, "learn")["state_type"] not in {"RUNNING", "PENDING", "COMPLETED"}


def test_cancelling_on_the_pages_stops_a_run_that_was_typed(
    prefect_api: str, long_run: "subprocess.Popen[str]"
) -> None:
    run = newest(prefect_api, "learn")
    assert run["state_type"] == "RUNNING"
    httpx.post(f"{prefect_api}/flow_runs/{run['id']}/set_state", json={"state": {"type": "CANCELLING"}})
    _, errors = long_run.communicate(timeout=60)
    assert long_run.returncode == 143 and "stopped from outside" in errors and "Traceback" not in errors
    assert newest(prefect_api, "learn")["state_type"] == "CANCELLED"
